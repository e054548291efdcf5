"""zimage and diffusers as two ways to do the same four stages, over the same modules, and what they computed.

Both are called as their users call them. The modules are shared, so that no layout of weights favours one, and a model
of the released size fits once. Knows nothing of time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoint.locate import locate
from ..models.attention import check_works
from ..models.graphs import uses_graphs
from ..models.precision import choose_dtype
from ..models.quantized import quantized_copy
from ..models.transformer import BLOCKS
from ..pipeline import ZImagePipeline
from ..request import ResolvedRequest
from ..runtime import choose_device
from ..testing import build_diffusers
from .settings import Settings

Features = Sequence[Tensor]
"""Caption features (tokens, features) of the prompt and, with guidance, of the negative prompt."""

OnStep = Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]]


class Side(Protocol):
    """One way to make a picture of a request, in stages and as a whole."""

    def encode(self, texts: Sequence[str]) -> Features: ...

    def denoise(self, features: Features, latents: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
        """Noise (1, 16, h, w) to latents; `on_step` is both pipelines' `callback_on_step_end`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels (1, 3, H, W) in [0, 1]."""
        ...

    def draw(self, texts: Sequence[str], seed: int) -> Image.Image: ...


@dataclass(frozen=True)
class ZImage:
    """zimage's side; `options` are more of its pipeline's, such as a cache."""

    pipe: ZImagePipeline
    request: ResolvedRequest
    options: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, texts: Sequence[str]) -> Features:
        encoder, length = self.pipe.text_encoder, self.request.max_sequence_length
        return [encoder.encode(encoder.tokenize(text, length)) for text in texts]

    def denoise(self, features: Features, latents: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
        options = {"latents": latents, "output_type": "latent", "callback_on_step_end": on_step}
        return self._call(steps=steps, **options, **_embeds(features))[0]

    def decode(self, latents: Tensor) -> Tensor:
        return self.pipe.autoencoder.decode(latents)

    def draw(self, texts: Sequence[str], seed: int) -> Image.Image:
        return self._call(seed=seed, steps=self.request.num_inference_steps, **_named(texts))[0][0]

    def _call(self, *, steps: int, **options: Any) -> Any:
        guidance = self.request.guidance_scale
        return self.pipe(
            **_size(self.request), **self.options, **options, num_inference_steps=steps, guidance_scale=guidance,
            any_size=True, progress=False, return_dict=False,
        )  # fmt: skip


@dataclass(frozen=True)
class Diffusers:
    """diffusers' side."""

    pipe: Any
    request: ResolvedRequest

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Features:
        length = self.request.max_sequence_length
        positive, negative = self.pipe.encode_prompt(
            texts[0],
            do_classifier_free_guidance=len(texts) > 1,
            negative_prompt=texts[-1],
            max_sequence_length=length,
        )
        return [*positive, *negative]

    def denoise(self, features: Features, latents: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
        embeds = {name: [tensor] for name, tensor in _embeds(features).items()}
        options = {"latents": latents, "output_type": "latent", "callback_on_step_end": on_step}
        return self._call(steps=steps, **options, **embeds)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(scaled, return_dict=False)[0]
        return self.pipe.image_processor.postprocess(pixels, output_type="pt")

    def draw(self, texts: Sequence[str], seed: int) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        steps = self.request.num_inference_steps
        return self._call(generator=generator, steps=steps, **_named(texts))[0][0]

    def _call(self, *, steps: int, **options: Any) -> Any:
        guidance, length = self.request.guidance_scale, self.request.max_sequence_length
        return self.pipe(
            **_size(self.request), **options, num_inference_steps=steps, guidance_scale=guidance,
            max_sequence_length=length, return_dict=False,
        )  # fmt: skip


def load(settings: Settings, built: Any = None) -> tuple[ZImagePipeline, Any]:
    """zimage's pipeline and diffusers' over the same modules, or `None` where only zimage is measured of a model.

    `built` is diffusers' pipeline with the random weights that `settings` name, where it is there already.
    """
    pipe, theirs = _load(settings, built)
    if settings.compile or settings.cuda_graphs:
        pipe.compile(cuda_graphs=settings.cuda_graphs)
    if settings.compile and theirs is not None:
        # It replaces the call of each block, which zimage never makes: neither side computes with the other's.
        theirs.transformer.compile_repeated_blocks(fullgraph=True)
    return pipe, theirs


def _load(settings: Settings, built: Any) -> tuple[ZImagePipeline, Any]:
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    check_works(settings.attention, device, dtype)
    name: Any = str(dtype).removeprefix("torch.")
    if settings.model is not None and settings.only:
        pipe = ZImagePipeline.from_pretrained(settings.model, variant=settings.variant, dtype=dtype, device=device)
        return _arranged(pipe, settings), None
    if settings.model is None:
        variant: Any = settings.variant or "turbo"
        size: Any = settings.size
        theirs = built or build_diffusers(size=size, variant=variant, dtype=name, device=device)
    else:
        theirs = _load_diffusers(settings.model, dtype).to(device)
    theirs.set_progress_bar_config(disable=True)
    return _arranged(ZImagePipeline.from_diffusers(theirs, variant=settings.variant), settings), theirs


def _arranged(pipe: ZImagePipeline, settings: Settings) -> ZImagePipeline:
    """`pipe` with the layers and the attention of its transformer as the settings have them, beside the layers in full
    that others share."""
    if settings.weight_dtype is not None:
        kind, activations = settings.weight_dtype, settings.quantize_activations
        pipe.transformer = quantized_copy(pipe.transformer, kind, *BLOCKS, activations=activations)
    pipe.set_attention_backend(settings.attention)
    return pipe


def _load_diffusers(model: str, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    folder = locate(model).folder
    logs = [library.utils.logging for library in (diffusers, transformers)]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        return diffusers.ZImagePipeline.from_pretrained(folder, dtype=dtype)
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


@contextmanager
def counted(pipe: ZImagePipeline, theirs: Any = None) -> Iterator[Callable[[], dict[str, int]]]:
    """Within it, a function that says what was computed since its last call, by `pipe` or diffusers' pipeline `theirs`:
    "evaluations" of the transformer, each image and branch of guidance being one, and "prompts" that the text encoder
    read."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda module, inputs: counts.update({name: len(inputs[0])})

    def taken() -> dict[str, int]:
        done = {name: counts[name] for name in ("evaluations", "prompts")}
        counts.clear()
        return done

    hook = pipe.text_encoder.model.embed_tokens.register_forward_pre_hook(count("prompts"))
    try:
        with _evaluations_counted(pipe.transformer, getattr(theirs, "transformer", None), count("evaluations")):
            yield taken
    finally:
        hook.remove()


@contextmanager
def _evaluations_counted(transformer: Any, theirs: Any, count: Callable[..., None]) -> Iterator[None]:
    """Calls `count` with the inputs of each evaluation: at the last layer, which both sides call.

    A CUDA graph calls no layers, and one that is hooked is not recorded. Then zimage's evaluations are counted where it
    asks for one, and diffusers' at its own transformer, which we never call.
    """
    if not uses_graphs(transformer):
        hook = transformer.all_final_layer["2-1"].linear.register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()
        return
    denoise, together = transformer.denoise, transformer.denoise_together

    def counting(*inputs: Any) -> Any:
        count(None, inputs)
        return denoise(*inputs)

    def counting_each(latents: Tensor, captions: Sequence[Any], *inputs: Any) -> Any:
        for _ in captions:
            count(None, (latents,))
        return together(latents, captions, *inputs)

    transformer.denoise, transformer.denoise_together = counting, counting_each
    hook = None if theirs is None else theirs.register_forward_pre_hook(count)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        if uses_graphs(transformer):
            transformer.denoise, transformer.denoise_together = denoise, together


def as_tensor(result: Any) -> Tensor:
    """What a stage gave, as one row of float64 on the CPU; pictures from 0 to 1."""
    if isinstance(result, Image.Image):
        return torch.from_numpy(np.asarray(result, dtype=np.float64)).flatten() / 255
    parts = [result] if isinstance(result, Tensor) else result
    return torch.cat([part.detach().cpu().double().flatten() for part in parts])


def _embeds(features: Features) -> dict[str, Tensor]:
    return dict(zip(("prompt_embeds", "negative_prompt_embeds"), features, strict=False))


def _named(texts: Sequence[str]) -> dict[str, str]:
    return dict(zip(("prompt", "negative_prompt"), texts, strict=False))


def _size(request: ResolvedRequest) -> dict[str, Any]:
    return {"height": request.height, "width": request.width}
