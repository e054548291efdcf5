"""`ZImagePipeline`, the facade: wires prompt, text encoder, transformer, sampler and autoencoder into pictures.

The way of a picture is `_denoise` (encode, denoise) and `_finish` (decode, recipe); `__call__`, `stream`, `replay` and
`generate_many` are ways to walk it. Rules about options are in `rules.py`, mathematics in `sampling`, weights in
`models`, files in `checkpoint` and `files`, recipes and `replay` in `recorded.py`. A call writes nothing on the object,
so threads may share one: they take turns.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .adapters.attaching import Picked
from .callbacks import StepCallback, StepHook, check_cancel
from .calls import (
    PICTURE_OPTIONS,
    Call,
    CancelToken,
    as_request,
    progress_bar,
    read_sources,
    resolve_call,
    result_of,
    texts_of,
    tokenize,
    warn_if_fitted,
)
from .canvas import has_mask, lay_out, lay_out_control
from .controlled import Chosen
from .denoiser import Conditioning, Preparation, denoising_steps
from .errors import RequestError
from .hires import Hires, demands, passes
from .many import Drawing
from .models.autoencoder import to_image
from .output import Drawn, Step, ZImageOutput, check_output_type, check_stackable
from .recorded import Recorded
from .request import AnyRequest, ResolvedRequest
from .sampling.samplers import SamplerStep
from .starting import Start, begin, enlarged


class ZImagePipeline(Recorded):
    """Pictures from Z-Image and Z-Image-Turbo.

    Args:
        scheduler: diffusers' scheduler, of which the static shift is read, or that shift itself.
        vae: diffusers' `AutoencoderKL`.
        text_encoder: transformers' Qwen3 model, bare or as a causal LM.
        tokenizer: its tokenizer.
        transformer: diffusers' `ZImageTransformer2DModel`.
        variant: "base" or "turbo"; by default what the shift tells.
        sampler: of pictures that ask for none; by default what the scheduler's config names, else "euler".

    The components are used as they are, shared and not copied. `CheckpointError` if they do not belong together.
    """

    _bar_options: Mapping[str, Any] = MappingProxyType({})

    def resolve(self, request: AnyRequest | str) -> ResolvedRequest:
        """`request`, or that of a text, with nothing left open for this model, its images read; `RequestError` if it
        cannot work."""
        limits, asked = self.limits, read_sources(self._with_adapters(as_request(request)))
        resolved = asked.resolve(self.variant, shift=self.shift, limits=limits)
        self._choose(resolved)
        if resolved.image is not None:
            lay_out(resolved, limits)
        if resolved.control_image is not None:
            lay_out_control(resolved, limits)
        warn_if_fitted(asked, resolved)
        return resolved

    @property
    def _interrupt(self) -> bool:
        """What diffusers' scripts set to stop a picture; here only what a callback is given has it."""
        return False

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """Raises `RequestError`: this pipeline may be drawing for several callers."""
        if value:
            raise RequestError(
                "a pipeline draws for whoever calls it, so _interrupt is set on the first argument of the callback, "
                "which is of one call; from elsewhere give the call cancel=threading.Event() and set that"
            )

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
        hires: float | Hires | None = None,
        any_size: bool | None = None,
        cancel: CancelToken | None = None,
        progress: bool = True,
        embed_recipe: bool = True,
    ) -> ZImageOutput | tuple[Any]:
        """Make pictures. Arguments are diffusers'; those of a picture are explained at `GenerationRequest`.

        Args:
            prompt: a text, a list of texts, or one or more requests (then no other option of a picture).
            num_images_per_prompt: image k of the call has the seed `seed + k`.
            generator: instead of `seed`; noise as diffusers draws it, or seeds for pictures that draw more than once.
            latents: (images, 16, height/8, width/8) instead of a seed's noise; a seed beside them is of what else is
                drawn, for `hires` and `diversity`.
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
        check_cancel(cancel)
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
            images = []
            for request in requests:
                chosen = self._choose(request)
                drawn = result_of(self._denoise(request, chosen, call))
                call.check_cancelled()
                images.append(self._finish(request, chosen, drawn, output_type, embed_recipe, call.take_changed()))
        collected = self._collected(images, output_type, requests[-1])
        return ZImageOutput(collected, tuple(requests), self._rungs()[rungs:]) if return_dict else (collected,)

    def stream(
        self, request: AnyRequest | str, *, cancel: CancelToken | None = None, embed_recipe: bool = True
    ) -> Generator[Step, None, None]:
        """Make one picture a denoising step at a time; the last `Step` carries the image. `close()` cancels.

        Raises `RequestError` and `NotEnoughMemory` at once, the rest while iterating.
        """
        resolved = self.resolve(request)
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

        Raises `RequestError` at once if `requests` is one request or `cancel` no event; all else, as a call does, while
        iterating.
        """
        options = self._bar_options if progress else {"disable": True}
        return Drawing(self, requests, cancel=cancel, bar_options=options, embed_recipe=embed_recipe).pictures()

    def _denoise(self, request: ResolvedRequest, chosen: Chosen, call: Call) -> Generator[SamplerStep, None, Tensor]:
        """Encode, then one denoising step at a time, of each pass; returns the final latents (1, C, H, W)."""
        call.check_cancelled()
        with self._computing():
            conditioning = self._attempt("prompt", request, call.let_go)(partial(self._condition, request, call))
        taken, latents = 0, None
        for one in passes(request):
            with self._computing():
                larger = None if latents is None else self._enlarge(request, latents, call)
                begun = self._start(one, chosen, call, larger, one if larger is None else request)
            latents, conditioning = yield from self._take_steps(one, chosen.adapters, call, conditioning, begun, taken)
            taken += one.steps
        assert latents is not None
        return latents

    def _take_steps(
        self,
        request: ResolvedRequest,
        adapters: Picked,
        call: Call,
        conditioning: Conditioning,
        begun: Start,
        taken: int,
    ) -> Generator[SamplerStep, None, tuple[Tensor, Conditioning]]:
        """The steps of one pass, counted on from those `taken` before; returns its latents and the conditioning, which
        a callback may have changed."""
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
                call.preparation.require_current()
                step = steps.send(replaced)
            step = replace(step, index=taken + step.index)
            latents, replaced = step.latents, None
            if call.bar is not None:
                call.bar.update()
            yield step
            if call.hook is None:
                continue
            replaced, changed = call.hook(step, conditioning, call.changed)
            latents = latents if replaced is None else replaced
            if changed is not conditioning:
                conditioning, replaced = changed, None
                steps = start(conditioning, latents, start=step.index + 1 - taken)
        return latents, conditioning

    def _condition(self, request: ResolvedRequest, call: Call) -> Conditioning:
        features = []
        for name, text in zip(("prompt_embeds", "negative_prompt_embeds"), texts_of(request), strict=False):
            given = request.tensors.get(name)
            if given is None:
                given = self.text_encoder.encode(call.tokens[text, request.max_sequence_length])
            features.append(given.to(self.device))
        return Conditioning(*features)

    def _start(
        self, request: ResolvedRequest, chosen: Chosen, call: Call, larger: Tensor | None, planned: ResolvedRequest
    ) -> Start:
        """The start of one pass, with the memory that the plan has for the picture `planned`."""
        if call.leg is not None and call.leg.latents is not None:
            return Start(call.leg.latents)
        shape, net = self._latent_shape(request), None if chosen.controlnet is None else chosen.controlnet.net
        make = partial(begin, request, shape, self.device, self.autoencoder, self.limits, net, larger=larger)
        attempt = self._attempt("image" if demands(planned).from_image else "prompt", planned, call.let_go)
        return attempt(lambda: make(strip_levels=self._strip_levels(planned)))

    def _enlarge(self, request: ResolvedRequest, latents: Tensor, call: Call) -> Tensor:
        """What the first pass left as the second begins with it: latents or pixels of the larger size."""
        first, again = passes(request)
        stage = "denoising" if request.hires is not None and request.hires.upscale == "latents" else "decoding"

        def enlarge() -> Tensor:
            if stage == "denoising":
                return enlarged(latents, *self._latent_shape(again)[1:])
            pixels = self.autoencoder.decode(latents, self._strip_levels(first))
            return enlarged(pixels, again.height, again.width).clamp_(0, 1)

        return self._attempt(stage, first, call.let_go)(enlarge)

    def _latent_shape(self, request: ResolvedRequest) -> tuple[int, int, int]:
        limits = self.limits
        return limits.latent_channels, request.height // limits.latent_scale, request.width // limits.latent_scale

    def _finish(
        self,
        request: ResolvedRequest,
        chosen: Chosen,
        latents: Tensor,
        output_type: str,
        embed_recipe: bool,
        changed: Sequence[str] = (),
    ) -> Any:
        """Decode, and put the recipe to the picture; `changed` are the tensors that a callback had a hand in."""
        if output_type == "latent":
            return latents
        decode = self._attempt("decoding", request)
        with self._computing():
            strips, pixels, image = decode(partial(self._decode, request, latents, output_type))
        return pixels if image is None else self._picture(request, chosen, strips, image, embed_recipe, changed)

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
        total, chosen = request.steps, self._choose(request)
        for step in self._denoise(request, chosen, call):
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
                image=self._finish(request, chosen, step.latents, "pil", embed_recipe) if last else None,
            )
