"""`ZImagePipeline`, the facade: wires prompt, text encoder, transformer, sampler and autoencoder into pictures.

The way of a picture is `_denoise` (encode, denoise) and `_finish` (decode, recipe); `__call__`, `stream`, `replay` and
`generate_many` are ways to walk it. Rules about options are in `rules.py`, mathematics in `sampling`, weights in
`models`, files in `checkpoint` and `files`. A call writes nothing on the object, so threads may share one: they take
turns.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import runtime
from .callbacks import StepCallback, StepHook
from .calls import (
    PICTURE_OPTIONS,
    Call,
    CancelToken,
    progress_bar,
    read_given,
    read_sources,
    resolve_call,
    result_of,
    texts_of,
    tokenize,
    warn_if_fitted,
)
from .canvas import has_mask, lay_out, lay_out_control
from .denoiser import Conditioning, Preparation, denoising_steps
from .errors import RequestError
from .files.png import Picture, read_recipe
from .files.recipe import Recipe, differences, pixel_digest
from .files.relayed import require_one_model
from .many import Drawing
from .models.autoencoder import to_image
from .output import Drawn, Replay, Step, ZImageOutput, check_output_type, check_stackable, collect
from .previews import Previewing
from .request import AnyRequest, GenerationRequest, ResolvedRequest
from .sampling.samplers import SamplerStep
from .starting import Start, begin


class ZImagePipeline(Previewing):
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

    _bar_options: Mapping[str, Any] = MappingProxyType({})

    def resolve(self, request: AnyRequest) -> ResolvedRequest:
        """`request` with nothing left open for this model, its images read; `RequestError` if it cannot work."""
        limits, asked = self.limits, read_sources(self._with_adapters(request))
        resolved = asked.resolve(self.variant, shift=self.shift, limits=limits)
        self._controlnet_for(resolved)
        if resolved.image is not None:
            lay_out(resolved, limits)
        if resolved.control_image is not None:
            lay_out_control(resolved, limits)
        warn_if_fitted(asked, resolved)
        return resolved

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
        cache: str | Sequence[int] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        keep_steps: bool | None = None,
        padding: int | Sequence[int] | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float | None = None,
        adapters: Mapping[str, float] | None = None,
        diversity: float | None = None,
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
            joint_attention_kwargs: {"scale": s} makes every adapter's strength s times what it else would be.
            output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W) or "latent".
            return_dict: `False` returns `(images,)`.
            callback_on_step_end: called after each step of each image with (pipeline, step, timestep, tensors);
                may return changed tensors; setting `pipeline._interrupt = True` on its first argument cancels.
            cancel: an event; once it is set, `Cancelled` is raised before the next step.
            progress: show a progress bar.
            embed_recipe: let the pictures carry their recipe into the files they are saved to.

        Raises `RequestError` and `NotEnoughMemory` before anything is computed, `NonFiniteError`, `Cancelled`.
        """
        options = {name: value for name, value in locals().items() if name in PICTURE_OPTIONS and value is not None}
        check_output_type(output_type)
        if joint_attention_kwargs:
            options["adapters"] = self._scaled(adapters, joint_attention_kwargs)
        hook = StepHook.of(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        requests = resolve_call(
            prompt, options, num_images_per_prompt, generator, resolve=self.resolve, latent_shape=self._latent_shape
        )
        check_stackable(requests, output_type)
        for request in requests:
            self._fit(request)
        tokens, rungs = tokenize(requests, self.text_encoder), len(self._rungs())
        with progress_bar(requests, self._bar_options if progress else {"disable": True}) as bar:
            call = Call(Preparation(self.transformer), tokens, cancel, hook, bar)
            images = [
                self._finish(request, result_of(self._denoise(request, call)), output_type, embed_recipe)
                for request in requests
            ]
        collected = collect(images, output_type)
        return ZImageOutput(collected, tuple(requests), self._rungs()[rungs:]) if return_dict else (collected,)

    def stream(
        self, request: AnyRequest | str, *, cancel: CancelToken | None = None, embed_recipe: bool = True
    ) -> Generator[Step, None, None]:
        """Make one picture a denoising step at a time; the last `Step` carries the image. `close()` cancels.

        Raises `RequestError` and `NotEnoughMemory` at once, the rest while iterating.
        """
        resolved = self.resolve(GenerationRequest(request) if isinstance(request, str) else request)
        self._fit(resolved)
        tokens = tokenize([resolved], self.text_encoder)
        return self._stream(resolved, Call(Preparation(self.transformer), tokens, cancel), embed_recipe)

    def generate_many(
        self,
        requests: Iterable[AnyRequest | str],
        *,
        cancel: CancelToken | None = None,
        progress: bool = True,
        embed_recipe: bool = True,
    ) -> Generator[Drawn, None, None]:
        """Make many pictures, in order, each with the bits of `self(request)` and yielded when it is done.

        On CUDA, where the plan has room, the next prompt is encoded and the last picture decoded beside the steps of
        the one between. `requests` may be endless: it is read one ahead, before the last step of the picture before.
        What is wrong with a request is raised at its turn, after the pictures before it; `close()` ends it.

        Raises `RequestError` at once if `requests` is one request; all else, as a call does, while iterating.
        """
        options = self._bar_options if progress else {"disable": True}
        return Drawing(self, requests, cancel=cancel, bar_options=options, embed_recipe=embed_recipe).pictures()

    def replay(
        self,
        picture: str | os.PathLike[str] | Recipe,
        *,
        image: Any = None,
        mask_image: Any = None,
        control_image: Any = None,
        cancel: CancelToken | None = None,
        progress: bool = False,
    ) -> Replay:
        """Make the picture of a PNG (or of a recipe) again, and say whether its pixels are the same.

        A picture that was made from images needs them again, `image`, `mask_image` and `control_image` as they were
        given then. Raises `RequestError` for others, and if the file has no recipe, or one that this model cannot
        follow; `AdapterError` if it was made with adapters or a ControlNet that are not loaded from the same files.
        """
        recipe = picture if isinstance(picture, Recipe) else read_recipe(picture)
        require_one_model(recipe)
        if recipe.given:
            raise RequestError(
                "the picture was made from tensors that its recipe does not hold; pass them in a request instead"
            )
        self._require_adapters(recipe)
        images = read_given(image=image, mask_image=mask_image, control_image=control_image)
        request = recipe.with_images(**images)
        output = self(request, cancel=cancel, progress=progress)
        assert isinstance(output, ZImageOutput)
        made = output.images[0]
        return Replay(
            image=made,
            request=output.requests[0],
            same_bits=made.recipe.pixels == recipe.pixels,
            differences=tuple(differences(recipe, made.recipe.model, made.recipe.runtime)),
        )

    def recipe(self, request: ResolvedRequest, image: Image.Image, strip_levels: int | None = None) -> Recipe:
        """All that is needed to make `image` again from `request`.

        `strip_levels` of its decode were in strips, as many as would be now if not given.
        """
        strip_levels = self._strip_levels(request) if strip_levels is None else strip_levels
        return Recipe(
            request=request,
            model={**self.model, "variant": self.variant.name},
            runtime=runtime.describe(
                self.device,
                self.dtype,
                strip_levels,
                self.weights,
                activations=self.activations,
                attention=self.attention_backend,
                compiled=self.compiled,
            ),
            pixels=pixel_digest(image),
            adapters=self._described_adapters(request),
            controlnet=self._described_controlnet(request),
        )

    def _denoise(self, request: ResolvedRequest, call: Call) -> Generator[SamplerStep, None, Tensor]:
        """Encode, then one denoising step at a time; returns the final latents (1, C, H, W)."""
        call.check_cancelled()
        adapters = self._attachments.pick(request.adapters)
        with self._computing():
            conditioning = self._attempt("prompt", request, call.let_go)(partial(self._condition, request, call))
            begun = self._start(request, call)
        attempt, latents = self._attempt("denoising", request, call.let_go), begun.latents
        levels = None if call.leg is None else call.leg.levels
        start = partial(
            denoising_steps,
            call.preparation.under(adapters),
            request,
            attempt=attempt,
            known=begun.known,
            control=begun.control,
            levels=levels,
        )
        steps = start(conditioning, latents)
        replaced = None
        for _ in range(request.steps if call.leg is None else len(call.leg.levels) - 1):
            call.check_cancelled()
            with self._computing(adapters):
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
                steps = start(conditioning, latents, start=step.index + 1)
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

    def _start(self, request: ResolvedRequest, call: Call) -> Start:
        if call.leg is not None and call.leg.latents is not None:
            return Start(call.leg.latents)
        stage = "prompt" if request.image is None and request.control_image is None else "image"
        shape, net = self._latent_shape(request), self._controlnet_for(request)
        make = partial(begin, request, shape, self.device, self.autoencoder, self.limits, net)
        return self._attempt(stage, request, call.let_go)(lambda: make(self._strip_levels(request)))

    def _latent_shape(self, request: ResolvedRequest) -> tuple[int, int, int]:
        limits = self.limits
        return limits.latent_channels, request.height // limits.latent_scale, request.width // limits.latent_scale

    def _finish(self, request: ResolvedRequest, latents: Tensor, output_type: str, embed_recipe: bool) -> Any:
        if output_type == "latent":
            return latents
        decode = self._attempt("decoding", request)
        with self._computing():
            strips, pixels, image = decode(partial(self._decode, request, latents, output_type))
        return pixels if image is None else self._picture(request, strips, image, embed_recipe)

    def _picture(self, request: ResolvedRequest, strips: int, image: Image.Image, embed_recipe: bool) -> Picture:
        return Picture.of(image, self.recipe(request, image, strips) if embed_recipe else None)

    def _decode(
        self, request: ResolvedRequest, latents: Tensor, output_type: str
    ) -> tuple[int, Tensor, Image.Image | None]:
        """How many levels were decoded in strips, pixels (1, 3, H, W), and for "pil" their picture."""
        strips = self._strip_levels(request)
        pixels = self.autoencoder.decode(latents, strips)
        if has_mask(request):
            pixels = lay_out(request, self.limits).put_back(pixels)
        return strips, pixels, to_image(pixels) if output_type == "pil" else None

    def _stream(self, request: ResolvedRequest, call: Call, embed_recipe: bool) -> Generator[Step, None, None]:
        total = request.steps
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
                previewer=self.preview,
                image=self._finish(request, step.latents, "pil", embed_recipe) if last else None,
            )
