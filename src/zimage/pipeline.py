"""`ZImagePipeline`, the facade: wires prompt, text encoder, transformer, sampler and autoencoder into pictures.

The way of a picture is `_denoise` (encode, denoise) and `_finish` (decode, recipe); `__call__`, `stream` and `replay`
are three ways to walk it. Rules about options are in `rules.py`, mathematics in `sampling`, weights in `models`,
files in `checkpoint` and `files`. A call writes nothing on the object, so threads may share one: they take turns.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import components, runtime
from .callbacks import StepCallback, StepHook
from .calls import PICTURE_OPTIONS, Call, CancelToken, progress_bar, resolve_call, texts_of, tokenize
from .checkpoint.inspect import fingerprint
from .checkpoint.load import Components, load_components
from .checkpoint.locate import locate
from .checkpoint.save import save_components
from .denoiser import Conditioning, Preparation, denoising_steps
from .errors import RequestError
from .files.png import Picture, read_recipe
from .files.recipe import Recipe, differences, pixel_digest
from .models.autoencoder import Autoencoder, to_image
from .models.precision import choose_dtype
from .models.text_encoder import TextEncoder, without_last_layer
from .models.transformer import ZImageTransformer
from .output import Replay, Step, ZImageOutput, check_output_type, check_stackable, collect
from .request import AnyRequest, GenerationRequest, ResolvedRequest
from .rules import Limits
from .sampling.noise import seeded_noise
from .sampling.samplers import SamplerStep
from .variants import detect_variant

_UNKNOWN_MODEL = {"source": "", "revision": "", "fingerprint": ""}


class ZImagePipeline:
    """Pictures from Z-Image and Z-Image-Turbo.

    Args:
        scheduler: diffusers' scheduler, of which the static shift is read, or that shift itself.
        vae: diffusers' `AutoencoderKL`.
        text_encoder: transformers' Qwen3 model, bare or as a causal LM.
        tokenizer: its tokenizer.
        transformer: diffusers' `ZImageTransformer2DModel`.
        variant: "base" or "turbo"; by default what the shift tells.

    The components are used as they are, shared and not copied. `CheckpointError` if they do not belong together.
    """

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        transformer: Any,
        *,
        variant: str | None = None,
        model: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.shift = components.shift_of(scheduler)
        self.model = {**_UNKNOWN_MODEL, **(model or {})}
        self.variant = detect_variant(variant=variant, hub_id=self.model["source"], shift=self.shift)
        self.text_encoder = TextEncoder(without_last_layer(text_encoder), tokenizer)
        self.transformer = ZImageTransformer.share(transformer)
        self.autoencoder = Autoencoder(vae)
        self._folder = folder
        self._turn = threading.RLock()
        self._bar_options: dict[str, Any] = {}
        components.check_parts(self.text_encoder.model.config, self.transformer.config, vae.config)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        variant: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        torch_dtype: str | torch.dtype | None = None,
        low_cpu_mem_usage: bool | None = None,
    ) -> ZImagePipeline:
        """Load a checkpoint in the Hugging Face layout.

        Args:
            model: "base", "turbo", a hub id, or a folder.
            variant: "base" or "turbo", where neither the hub id nor the scheduler's shift tells.
            dtype: "auto" (the default), "bfloat16", "float16", "float32" or the torch dtype; `torch_dtype` is the same.
            device: by default CUDA, MPS or the CPU, the first there is.
            revision, cache_dir, token, local_files_only: as for huggingface_hub, whose environment variables count.
            low_cpu_mem_usage: accepted for diffusers' scripts; loading is always tensor by tensor.

        Raises `CheckpointError` for what cannot be found, read or trusted, `RequestError` for wrong arguments.
        """
        if dtype is not None and torch_dtype is not None:
            raise RequestError("dtype and torch_dtype are both given; they are one setting, leave torch_dtype out")
        target = runtime.choose_device(device)
        precision = choose_dtype(dtype or torch_dtype or "auto", target)
        place = locate(model, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        parts = load_components(place.folder, dtype=precision, device=target)
        source = place.hub_id or runtime.portable_path(place.folder)
        return cls(
            parts.shift,
            parts.vae,
            parts.text_encoder,
            parts.tokenizer,
            parts.transformer,
            variant=variant,
            model={"source": source, "revision": place.revision or "", "fingerprint": fingerprint(place.folder)},
            folder=place.folder,
        )

    @classmethod
    def from_diffusers(cls, pipeline: Any, *, variant: str | None = None) -> ZImagePipeline:
        """A pipeline over the very modules of a diffusers `ZImagePipeline`."""
        return cls(**components.parts_of(pipeline), variant=variant)

    def to_diffusers(self) -> Any:
        """A diffusers `ZImagePipeline` over the very modules of this one."""
        return components.to_diffusers(
            vae=self.autoencoder.vae,
            text_encoder=self.text_encoder.model,
            tokenizer=self.text_encoder.tokenizer,
            transformer=self.transformer,
            shift=self.shift,
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_size: str | int = "5GB") -> None:
        """Write the checkpoint in the Hugging Face layout, whole or not at all; `folder` must be new or empty."""
        parts = Components(
            tokenizer=self.text_encoder.tokenizer,
            text_encoder=self.text_encoder.model,
            text_encoder_layers=self.text_encoder.model.config.num_hidden_layers + 1,
            transformer=self.transformer,
            vae=self.autoencoder.vae,
            shift=self.shift,
            folder=self._folder,
        )
        with self._turn:
            save_components(parts, folder, max_shard_size=max_shard_size)

    def to(self, *targets: Any, device: Any = None, dtype: Any = None) -> ZImagePipeline:
        """Move to a device, a dtype or both, as `torch.nn.Module.to` does; returns the pipeline itself."""
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target
        place = self.device if device is None else runtime.choose_device(device)
        precision = self.dtype if dtype is None else choose_dtype(dtype, place)
        with self._turn:
            for module in (self.text_encoder.model, self.transformer, self.autoencoder.vae):
                torch.nn.Module.to(module, device=place, dtype=precision)  # diffusers' own `to` logs a warning
            self.text_encoder.forget()
        return self

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.x_pad_token.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return self.transformer.compute_dtype

    @property
    def limits(self) -> Limits:
        """What the loaded model can take, read from its configuration."""
        return components.limits_of(self.transformer.config, self.autoencoder.vae.config)

    def resolve(self, request: AnyRequest) -> ResolvedRequest:
        """`request` with nothing left open for this model; raises `RequestError` if it cannot work."""
        return request.resolve(self.variant, shift=self.shift, limits=self.limits)

    def set_progress_bar_config(self, **options: Any) -> None:
        """tqdm options for the progress bars of later calls, as in diffusers; `disable=True` turns them off."""
        self._bar_options = options

    def __call__(
        self,
        prompt: str | Sequence[str] | AnyRequest | Sequence[AnyRequest] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        cfg_normalization: float | bool | None = None,
        cfg_truncation: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        negative_prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        sampler: str | None = None,
        any_size: bool | None = None,
        cancel: CancelToken | None = None,
        progress: bool = True,
        embed_recipe: bool = True,
    ) -> ZImageOutput | tuple[Any]:
        """Make pictures. Arguments are diffusers'; those of a picture are explained at `GenerationRequest`.

        Args:
            prompt: a text, a list of texts, or one or more requests (then no other option of a picture).
            num_images_per_prompt: image k of the call has the seed `seed + k`.
            generator: instead of `seed`; its noise is drawn as diffusers draws it.
            latents: (images, 16, height/8, width/8) instead of a seed.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W) or "latent".
            return_dict: `False` returns `(images,)`.
            callback_on_step_end: called after each step of each image with (pipeline, step, timestep, tensors);
                may return changed tensors; setting `pipeline._interrupt = True` on its first argument cancels.
            cancel: an event; once it is set, `Cancelled` is raised before the next step.
            progress: show a progress bar.
            embed_recipe: let the pictures carry their recipe into the files they are saved to.

        Raises `RequestError` before anything is computed, `NonFiniteError`, `Cancelled`.
        """
        options = {name: value for name, value in locals().items() if name in PICTURE_OPTIONS and value is not None}
        check_output_type(output_type)
        if joint_attention_kwargs:
            raise RequestError("joint_attention_kwargs scales adapters and none is attached; leave it out")
        hook = StepHook.of(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        requests = resolve_call(
            prompt, options, num_images_per_prompt, generator, resolve=self.resolve, latent_shape=self._latent_shape
        )
        check_stackable(requests, output_type)
        tokens = tokenize(requests, self.text_encoder)
        with progress_bar(requests, self._bar_options if progress else {"disable": True}) as bar:
            call = Call(Preparation(self.transformer), tokens, cancel, hook, bar)
            images = [
                self._finish(request, _result(self._denoise(request, call)), output_type, embed_recipe)
                for request in requests
            ]
        collected = collect(images, output_type)
        return ZImageOutput(collected, tuple(requests)) if return_dict else (collected,)

    def stream(
        self, request: AnyRequest | str, *, cancel: CancelToken | None = None, embed_recipe: bool = True
    ) -> Generator[Step, None, None]:
        """Make one picture a denoising step at a time; the last `Step` carries the image. `close()` cancels.

        Raises `RequestError` at once, the rest while iterating.
        """
        resolved = self.resolve(GenerationRequest(request) if isinstance(request, str) else request)
        tokens = tokenize([resolved], self.text_encoder)
        return self._stream(resolved, Call(Preparation(self.transformer), tokens, cancel), embed_recipe)

    def replay(
        self, picture: str | os.PathLike[str] | Recipe, *, cancel: CancelToken | None = None, progress: bool = False
    ) -> Replay:
        """Make the picture of a PNG (or of a recipe) again, and say whether its pixels are the same.

        Raises `RequestError` if the file has no recipe, or one that this model cannot follow.
        """
        recipe = picture if isinstance(picture, Recipe) else read_recipe(picture)
        if not recipe.replayable:
            raise RequestError(
                "the picture was made from tensors that its recipe does not hold; pass them in a request instead"
            )
        output = self(recipe.request, cancel=cancel, progress=progress)
        assert isinstance(output, ZImageOutput)
        image = output.images[0]
        return Replay(
            image=image,
            request=output.requests[0],
            same_bits=image.recipe.pixels == recipe.pixels,
            differences=tuple(differences(recipe, image.recipe.model, image.recipe.runtime)),
        )

    def recipe(self, request: ResolvedRequest, image: Image.Image) -> Recipe:
        """All that is needed to make `image` again from `request`."""
        return Recipe(
            request=request,
            model={**self.model, "variant": self.variant.name},
            runtime=runtime.describe(self.device, self.dtype),
            pixels=pixel_digest(image),
        )

    def _denoise(self, request: ResolvedRequest, call: Call) -> Generator[SamplerStep, None, Tensor]:
        """Encode, then one denoising step at a time; returns the final latents (1, C, H, W)."""
        call.check_cancelled()
        with self._turn:
            conditioning = self._condition(request, call)
            latents = self._start(request)
        steps = denoising_steps(call.preparation, request, conditioning, latents)
        replaced = None
        for _ in range(request.num_inference_steps):
            call.check_cancelled()
            with self._turn, torch.no_grad():
                step = steps.send(replaced)
            latents, replaced = step.latents, None
            if call.bar is not None:
                call.bar.update()
            yield step
            if call.hook is None:
                continue
            replaced, changed = call.hook(step, conditioning)
            latents = latents if replaced is None else replaced
            if changed is not conditioning:
                conditioning, replaced = changed, None
                steps = denoising_steps(call.preparation, request, conditioning, latents, start=step.index + 1)
        call.check_cancelled()
        return latents

    def _condition(self, request: ResolvedRequest, call: Call) -> Conditioning:
        features = []
        for name, text in zip(("prompt_embeds", "negative_prompt_embeds"), texts_of(request), strict=False):
            given = request.tensors.get(name)
            if given is None:
                given = self.text_encoder.encode(call.tokens[text, request.max_sequence_length])
            features.append(given.to(self.device))
        return Conditioning(*features)

    def _start(self, request: ResolvedRequest) -> Tensor:
        given = request.tensors.get("latents")
        noise = seeded_noise(request.seed, self._latent_shape(request))[None] if given is None else given
        return noise.to(device=self.device, dtype=torch.float32)

    def _latent_shape(self, request: ResolvedRequest) -> tuple[int, int, int]:
        limits = self.limits
        return limits.latent_channels, request.height // limits.latent_scale, request.width // limits.latent_scale

    def _finish(self, request: ResolvedRequest, latents: Tensor, output_type: str, embed_recipe: bool) -> Any:
        if output_type == "latent":
            return latents
        with self._turn:
            pixels = self.autoencoder.decode(latents)
        if output_type != "pil":
            return pixels
        image = to_image(pixels)
        return Picture.of(image, self.recipe(request, image) if embed_recipe else None)

    def _stream(self, request: ResolvedRequest, call: Call, embed_recipe: bool) -> Generator[Step, None, None]:
        total = request.num_inference_steps
        for step in self._denoise(request, call):
            last = step.index + 1 == total
            yield Step(
                index=step.index,
                total=total,
                sigma=step.sigma,
                sigma_next=step.sigma_next,
                latents=step.latents,
                denoised=step.denoised,
                request=request,
                image=self._finish(request, step.latents, "pil", embed_recipe) if last else None,
            )


def _result(run: Generator[SamplerStep, None, Tensor]) -> Tensor:
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value
