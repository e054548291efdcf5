"""What one picture is made from: `GenerationRequest` as asked, `ResolvedRequest` with nothing left open.

Also how one call becomes a request per image. The rules about options stand in `rules.py`. Plain data, no torch;
knows nothing of checkpoints, devices or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .arrays import plain
from .caching import noise_levels, resolve_cache
from .editing import SourceImage, check_steps, resolve_editing, skipped_steps
from .equality import Comparable
from .errors import RequestError
from .hires import Hires, resolve_hires
from .rules import (
    MAX_SEED,
    Limits,
    check_levels,
    check_sampler,
    integer,
    is_tensor,
    resolve_adapters,
    resolve_diversity,
    resolve_guidance,
    resolve_seed,
    resolve_sigmas,
    resolve_size,
    resolve_steps,
    resolve_tensors,
    resolve_texts,
    shown,
)
from .variants import Variant

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class GenerationRequest(Comparable):
    """One picture as a user asks for it. `None` means: as the model's recipe has it.

    Equal are those that ask for the same: tensors by their values, images in memory only if they are one object.

    Args:
        prompt: the text; may be empty. Left out only where `prompt_embeds` is given.
        negative_prompt: what to steer away from; needs guidance (base only).
        height, width: pixels, multiples of 16, 256² to 2048² in area for a model trained at 1024².
        num_inference_steps: denoising steps, 1 to 1000; with Euler one step is one evaluation, two with guidance.
        guidance_scale: g in `pos + g·(pos − neg)`; 0 is off. Tools that write `neg + c·(pos − neg)` have c = g + 1.
        cfg_normalization: caps the norm of the guided prediction at so many times the positive one's;
            `True` is 1, `False` or 0 is off.
        cfg_truncation: guidance is off in steps whose `1 − sigma` exceeds this; 1 is never off.
        seed: 0 to 2³² − 1; `None` draws one, or beside `latents` is 0.
        sampler: "euler", "heun" or "dpmpp_2m".
        cache: "balanced" evaluates the model in about half of the steps and predicts the others from those before (base
            only, Euler or DPM++ 2M); or the steps to evaluate, counted from 0. See the guide for what it costs.
        adapters: names of loaded adapters and their strengths for this picture, in place of those that the pipeline was
            set to; 1 is as trained, {} is none.
        diversity: 0 to 4: lets pictures of one prompt differ more from seed to seed, by moving the caption's features
            in the first steps, so many of their standard deviations; 0 is off. 1 to 2 suit Turbo.
        sigmas: noise levels before the shift, descending within (0, 1], without the final 0; one per step.
        max_sequence_length: tokens of the prompt, template included, that are kept.
        latents: starting noise (16, height/8, width/8), with or without a batch axis of 1, instead of that of a seed.
            What else is drawn, for `hires` and `diversity`, is of the seed all the same.
        prompt_embeds, negative_prompt_embeds: caption features (tokens, features) instead of the texts.
        image: what the picture starts from: a path, the bytes of an image file or an open one, a Pillow image, an array
            (height, width, 3) or a tensor (3, height, width), of bytes or numbers in [0, 1]. `height` and `width` are
            then its own, cropped to multiples of 16; if they are given it is scaled to cover them.
        mask_image: of the image's size; what is white is repainted, the pixels under black stay as they are.
        strength: above 0, to 1: how much of the schedule is run, so how much may change. By default 0.6; 1 with a mask
            or padding.
        keep_steps: take all `num_inference_steps` on the part of the schedule that is run.
        padding: pixels to paint around the image: left, top, right, bottom, or one number for all.
        control_image: edges, depth, a pose or whatever else the loaded ControlNet follows, as `image` may be given.
            Without an image `height` and `width` are its own; else it is scaled to cover the picture.
        controlnet_conditioning_scale: 0 to 2: how much of it is added, by default 0.75.
        hires: how many times as large the picture is made in a second pass, above 1, to 4, or a `Hires` that says how:
            `height` and `width` are those of the first.
        any_size: accept areas outside the range.
    """

    prompt: str | None = None
    _: KW_ONLY
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    cfg_normalization: float | bool | None = None
    cfg_truncation: float | None = None
    seed: int | None = None
    sampler: str | None = None
    cache: str | Sequence[int] | None = None
    adapters: Mapping[str, float] | None = None
    diversity: float | None = None
    sigmas: Sequence[float] | None = None
    max_sequence_length: int | None = None
    latents: Tensor | None = field(default=None, repr=False)
    prompt_embeds: Tensor | None = field(default=None, repr=False)
    negative_prompt_embeds: Tensor | None = field(default=None, repr=False)
    image: Any = field(default=None, repr=False)
    mask_image: Any = field(default=None, repr=False)
    strength: float | None = None
    keep_steps: bool = False
    padding: int | Sequence[int] | None = None
    control_image: Any = field(default=None, repr=False)
    controlnet_conditioning_scale: float | None = None
    hires: float | Hires | None = None
    any_size: bool = False

    def resolve(self, variant: Variant, *, shift: float | None = None, limits: Limits | None = None) -> ResolvedRequest:
        """Fill what is open from `variant` and refuse what cannot work; raises `RequestError` with the remedy."""
        limits = limits or Limits()
        editing = resolve_editing(self, limits)
        height, width = resolve_size(self, variant, limits, editing.canvas)
        sigmas = resolve_sigmas(self.sigmas)
        prompt, negative_prompt = resolve_texts(self)
        guidance = resolve_guidance(self, variant)
        sampler = check_sampler(variant.sampler if self.sampler is None else self.sampler)
        steps = resolve_steps(self.num_inference_steps, sigmas, variant)
        shift = variant.shift if shift is None else shift
        check_steps(steps, editing)
        levels = noise_levels(steps, shift, sigmas, editing.strength, editing.keep_steps)
        check_levels(levels)
        return ResolvedRequest(
            variant=variant.name,
            height=height,
            width=width,
            num_inference_steps=steps,
            sampler=sampler,
            shift=shift,
            sigmas=sigmas,
            seed=resolve_seed(self),
            max_sequence_length=integer(
                "max_sequence_length",
                variant.max_sequence_length if self.max_sequence_length is None else self.max_sequence_length,
                1,
                limits.max_sequence_length,
            ),
            tensors=resolve_tensors(self, height, width, limits),
            prompt=prompt,
            negative_prompt=negative_prompt,
            guidance_scale=guidance.scale,
            cfg_normalization=guidance.normalization,
            cfg_truncation=guidance.truncation,
            cache=resolve_cache(self.cache, variant, sampler=sampler, levels=levels, truncation=guidance.truncation),
            image=editing.image,
            mask_image=editing.mask_image,
            strength=editing.strength,
            keep_steps=editing.keep_steps,
            padding=editing.padding,
            control_image=editing.control_image,
            controlnet_conditioning_scale=editing.controlnet_conditioning_scale,
            adapters=resolve_adapters(self.adapters),
            diversity=resolve_diversity(self.diversity),
            hires=resolve_hires(self, (height, width), steps, limits),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ResolvedRequest(Comparable):
    """One picture with everything decided: with the same weights it is the same picture. See `GenerationRequest`.

    `sigmas` is empty where the schedule is the model's own, `linspace(1, 1/N, N)`; `shift` is applied to either.
    `cache` has the steps that the model is evaluated in, and is empty where that is every one. `adapters` has the names
    of those that act, sorted, and their strengths. `strength` is 1 where there is no image, and
    `controlnet_conditioning_scale` is 0 where there is no control image.
    Beside `latents` `seed` is 0 if none was given, or nothing else is drawn from it. `tensors` holds what was given in
    place of texts or noise, by argument name.
    """

    variant: str
    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    cfg_normalization: float
    cfg_truncation: float
    seed: int
    sampler: str
    shift: float
    sigmas: tuple[float, ...]
    max_sequence_length: int
    cache: tuple[int, ...] = ()
    image: SourceImage | None = None
    mask_image: SourceImage | None = None
    strength: float = 1.0
    keep_steps: bool = False
    padding: tuple[int, ...] = ()
    control_image: SourceImage | None = None
    controlnet_conditioning_scale: float = 0.0
    adapters: tuple[tuple[str, float], ...] = ()
    diversity: float = 0.0
    hires: Hires | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> int:
        """Denoising steps that are taken: all, less those that an image is ahead of, and those of a second pass."""
        again = () if self.hires is None else ((self.hires.strength or 0.0, False),)
        parts = ((self.strength, self.keep_steps), *again)
        return sum(self.num_inference_steps - skipped_steps(self.num_inference_steps, *part) for part in parts)

    def resolve(self, variant: Variant, *, shift: float | None = None, limits: Limits | None = None) -> ResolvedRequest:
        """Itself, checked against the model it is to run on; raises `RequestError` if it was made for another."""
        if self.variant != variant.name:
            raise RequestError(
                f"this request was resolved for {self.variant}, the pipeline holds {variant.name}; "
                "make a GenerationRequest of what should carry over"
            )
        if shift is not None and shift != self.shift:
            raise RequestError(
                f"this request was resolved for a schedule with shift {self.shift:g}, the pipeline's is {shift:g}; "
                "make a GenerationRequest of what should carry over"
            )
        return self.reopen().resolve(variant, shift=shift, limits=limits)

    def reopen(self) -> GenerationRequest:
        """The `GenerationRequest` that asks for exactly this picture."""
        given = dict(self.tensors)
        return GenerationRequest(
            None if "prompt_embeds" in given else self.prompt,
            negative_prompt=None if "negative_prompt_embeds" in given else self.negative_prompt,
            height=self.height,
            width=self.width,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            cfg_normalization=self.cfg_normalization,
            cfg_truncation=self.cfg_truncation,
            seed=None if "latents" in given and not (self.hires or self.diversity) else self.seed,
            sampler=self.sampler,
            cache=self.cache or None,
            adapters=dict(self.adapters),
            diversity=self.diversity,
            sigmas=self.sigmas or None,
            max_sequence_length=self.max_sequence_length,
            image=self.image,
            mask_image=self.mask_image,
            strength=None if self.image is None and self.strength == 1 else self.strength,
            keep_steps=self.keep_steps,
            padding=self.padding or None,
            control_image=self.control_image,
            controlnet_conditioning_scale=None if self.control_image is None else self.controlnet_conditioning_scale,
            hires=self.hires,
            any_size=True,
            **given,
        )


AnyRequest = GenerationRequest | ResolvedRequest


def expand_requests(
    prompt: str | Sequence[str] | None,
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    latents: Tensor | None = None,
    prompt_embeds: Tensor | Sequence[Tensor] | None = None,
    negative_prompt_embeds: Tensor | Sequence[Tensor] | None = None,
    image: Any = None,
    mask_image: Any = None,
    control_image: Any = None,
    **shared: Any,
) -> list[GenerationRequest]:
    """One request per image of a call, in diffusers' order: all images of the first prompt, then of the second.

    Image k of a call with the single seed s has the seed s + k. Raises `RequestError` where lengths disagree.
    """
    per_prompt = {
        "prompt": _listed("prompt", prompt, str),
        "negative_prompt": _listed("negative_prompt", negative_prompt, str),
        "prompt_embeds": _listed("prompt_embeds", prompt_embeds, None),
        "negative_prompt_embeds": _listed("negative_prompt_embeds", negative_prompt_embeds, None),
        "image": _listed_images("image", image),
        "mask_image": _listed_images("mask_image", mask_image),
        "control_image": _listed_images("control_image", control_image),
    }
    prompts = per_prompt["prompt"] or per_prompt["prompt_embeds"]
    if prompts is None:
        raise RequestError("nothing to draw: pass a prompt (it may be empty: '') or prompt_embeds")
    count = len(prompts) * integer("num_images_per_prompt", num_images_per_prompt, 1, 100_000)
    for name, values in per_prompt.items():
        if values is not None and len(values) not in (1, len(prompts)):
            raise RequestError(
                f"{name} has {len(values)} entries for {len(prompts)} prompts; pass one, or one for each"
            )
    seeds = _expand_seeds(seed, count)
    if latents is not None and (not is_tensor(latents) or latents.ndim != 4 or latents.shape[0] != count):
        raise RequestError(f"latents must be a tensor ({count}, channels, height/8, width/8), got {shown(latents)}")
    requests = []
    for index in range(count):
        position = index // num_images_per_prompt
        own = {name: values[position % len(values)] for name, values in per_prompt.items() if values is not None}
        if latents is not None:
            own["latents"] = latents[index]
        requests.append(GenerationRequest(**own, seed=seeds[index], **shared))
    return requests


def with_noise(request: ResolvedRequest, *, seed: int = 0, latents: Tensor | None = None) -> ResolvedRequest:
    """`request` started from another seed, or from given `latents`."""
    tensors = {name: tensor for name, tensor in request.tensors.items() if name != "latents"}
    if latents is not None:
        tensors["latents"] = latents
    return replace(request, seed=seed, tensors=tensors)


def _listed(name: str, value: Any, kind: type | None) -> list[Any] | None:
    if value is None:
        return None
    if isinstance(value, str) or is_tensor(value):
        return [value]
    if not isinstance(value, Sequence):
        wanted = "a text or a list of texts" if kind is str else "a tensor or a list of tensors"
        raise RequestError(f"{name} must be {wanted}, got {shown(value)}")
    if len(value) == 0:
        raise RequestError(f"{name} is an empty list; pass at least one entry")
    return list(value)


def _listed_images(name: str, value: Any) -> list[Any] | None:
    """One for each prompt, or one for all: only a list or a tuple is several."""
    if isinstance(value, list | tuple):
        return _listed(name, value, None)
    return None if value is None else [value]


def _expand_seeds(seed: int | Sequence[int] | None, count: int) -> list[int | None]:
    if seed is None:
        return [None] * count
    if isinstance(seed := plain(seed), Sequence):
        if len(seed) != count:
            raise RequestError(f"seed has {len(seed)} entries for {count} images; pass one seed, or one for each image")
        return list(seed)
    first = integer("seed", seed, 0, MAX_SEED)
    if first + count - 1 > MAX_SEED:
        raise RequestError(
            f"seed {first} leaves too few seeds for {count} images (image k has seed + k, up to {MAX_SEED}); "
            f"start at {MAX_SEED - count + 1} or below"
        )
    return [first + index for index in range(count)]
