"""What each option of a request may be: ranges, defaults from the variant, and what cannot work together.

Every function takes what was asked and returns what it means, or raises `RequestError` with the remedy. Plain
arithmetic, no torch: tensors that a caller hands in are looked at through their own methods only.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any

from .arrays import plain
from .errors import RequestError
from .variants import Variant

if TYPE_CHECKING:
    from torch import Tensor

    from .request import GenerationRequest

SAMPLERS = ("euler", "heun", "dpmpp_2m")
MAX_SEED = 2**32 - 1
"""Largest seed. torch's CPU generator uses the low 32 bits only: a larger seed would repeat a smaller one's image."""
NATIVE_SIDE = 1024
"""Pixels per side that the variants' sizes are meant for: the released models' (`sample_size` in vae/config.json)."""
_UNSAID = 32
"""AutoencoderKL's `sample_size` where a config does not say: below what any model is trained at."""
_DENSE = "torch.strided"
MIN_AREA, MAX_AREA = 256**2, 2048**2
"""Pixels of an image at that side; the models are made for 512² to 2048² (model cards)."""
MAX_STEPS = 1000
"""Steps of the training schedule (`num_train_timesteps`)."""

LEAST_LEVEL, NEAREST_LEVELS = 1e-12, 1e-6
"""The last noise level at least, and the part of a level that the next is below it: eight times what float32 tells."""

_LONGEST = 10**30
"""Beyond it a message does not show a number; Python refuses to write one of 4300 digits."""
MAX_DIVERSITY = 4.0
"""Of noise in caption features, in their standard deviations: far beyond where captions are still drawn."""
MAX_ADAPTERS, MAX_STRENGTH = 64, 100.0
"""Adapters of a picture, and how strong one may be; sliders from one look to another are used up to about 10."""


def native_side(sample_size: int) -> int:
    """Pixels per side that a model was trained at, from its VAE's `sample_size`."""
    return NATIVE_SIDE if sample_size == _UNSAID else sample_size


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a loaded model can take; the defaults are those of the released models."""

    latent_channels: int = 16
    latent_scale: int = 8
    native_side: int = NATIVE_SIDE
    """Pixels per side that the model was trained at; the default size and the range of areas go with it."""
    size_multiple: int = 16
    max_side: int = 8192
    """Pixels: `axes_lens` of the RoPE table times the size multiple."""
    caption_features: int = 2560
    max_sequence_length: int = 1504
    """Caption tokens, padded to 32, that the RoPE table has positions for, and one for the image."""


@dataclass(frozen=True)
class Guidance:
    """The three numbers of classifier-free guidance."""

    scale: float
    normalization: float
    truncation: float


def resolve_texts(request: GenerationRequest) -> tuple[str, str]:
    """Prompt and negative prompt, "" where features are given instead."""
    texts = []
    for name in ("prompt", "negative_prompt"):
        text, given = getattr(request, name), getattr(request, f"{name}_embeds")
        if text is not None and not isinstance(text, str):
            raise RequestError(f"{name} must be a text, got {shown(text)}")
        if text and not is_unicode(text):
            raise RequestError(f"{name} has characters that are not Unicode (halves of surrogate pairs); take them out")
        if text and given is not None:
            raise RequestError(f"{name} and {name}_embeds are both given; leave one out, only one can be used")
        texts.append(text or "")
    if request.prompt is None and request.prompt_embeds is None:
        raise RequestError("nothing to draw: pass a prompt (it may be empty: '') or prompt_embeds")
    return texts[0], texts[1]


def resolve_size(
    request: GenerationRequest, variant: Variant, limits: Limits, canvas: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Height and width as asked, else those of the `canvas` or, where there is none, the model's own."""
    for name in ("height", "width"):  # before one side follows from the other
        if getattr(request, name) is not None:
            integer(name, getattr(request, name), 1, limits.max_side)
    scale, step = limits.native_side / NATIVE_SIDE, limits.size_multiple
    if canvas is None:
        defaults = [max(step, round(getattr(variant, name) * scale / step) * step) for name in ("height", "width")]
    else:
        defaults = _sides_of(canvas, (request.height, request.width), step)
    sides = []
    for name, default in zip(("height", "width"), defaults, strict=True):
        side = integer(name, _or(getattr(request, name), default), 1, limits.max_side)
        if side % step:
            lower, upper = side // step * step, (side // step + 1) * step
            choices = f"{lower} or {upper}" if lower else str(upper)
            raise RequestError(f"{name} must be a multiple of {step}, got {side}; try {choices}")
        sides.append(side)
    height, width = sides
    if not flag("any_size", request.any_size):
        remedy = "Choose such a size" if canvas is None else "Choose a size, to which the image is scaled"
        check_area(height, width, limits, remedy)
    return height, width


def check_area(height: int, width: int, limits: Limits, remedy: str) -> None:
    """Raises `RequestError`, with a `remedy`, for a picture of an area that the model is not made for."""
    least, most = (area * (limits.native_side / NATIVE_SIDE) ** 2 for area in (MIN_AREA, MAX_AREA))
    if not least <= height * width <= most:
        raise RequestError(
            f"{width}x{height} is {height * width / 1e6:.2f} megapixels; the model is made for {least / 1e6:.2g} to "
            f"{most / 1e6:.2g} ({math.sqrt(least):.0f}² to {math.sqrt(most):.0f}²). {remedy}, or pass "
            "any_size=True"
        )


def _sides_of(canvas: tuple[int, int], asked: tuple[Any, Any], step: int) -> list[int]:
    """Height and width that follow from a canvas: its own, or in its proportion to the one side that was asked for."""
    given = [(int(side), own) for side, own in zip(asked, canvas, strict=True) if isinstance(side, Integral)]
    if len(given) == 1:
        side, own = given[0]
        return [max(step, round(other * side / own / step) * step) for other in canvas]
    return [max(step, own // step * step) for own in canvas]


def check_sampler(name: Any) -> str:
    """`name`, if a sampler is called so."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise RequestError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    return next(known for known in SAMPLERS if known == name)


def resolve_sigmas(sigmas: Sequence[float] | None) -> tuple[float, ...]:
    if sigmas is None:
        return ()
    try:
        given = tuple(sigmas)
    except TypeError:
        raise RequestError(f"sigmas must be a list of numbers, got {shown(sigmas)}") from None
    levels = tuple(number("each of sigmas", sigma, 0.0, 1.0) for sigma in given)
    if not levels or len(levels) > MAX_STEPS:
        raise RequestError(f"sigmas must have 1 to {MAX_STEPS} entries, got {len(levels)}")
    if levels[-1] == 0:
        raise RequestError("sigmas must not end in 0: the final 0 is appended; leave it out")
    for earlier, later in pairwise(levels):
        if later >= earlier:
            raise RequestError(f"sigmas must descend, got {later:g} after {earlier:g}; sort them, without repetition")
    return levels


def check_levels(levels: Sequence[float]) -> None:
    """Raises `RequestError` where noise levels, after the shift, would be one or 0 in the float32 that steps have."""
    if levels[-1] < LEAST_LEVEL:
        raise RequestError(
            f"the last noise level is {levels[-1]:.3g} after the shift, which is as good as the 0 that follows; "
            f"keep sigmas, and strength with keep_steps, above {LEAST_LEVEL:g}"
        )
    for earlier, later in pairwise(levels):
        if earlier - later < NEAREST_LEVELS * earlier:
            raise RequestError(
                f"noise levels {earlier:.9g} and {later:.9g}, after the shift, are one in float32; take fewer steps, "
                "or sigmas that are more than a millionth apart"
            )


def resolve_steps(steps: int | None, sigmas: tuple[float, ...], variant: Variant) -> int:
    if steps is None:
        return len(sigmas) or variant.num_inference_steps
    steps = integer("num_inference_steps", steps, 1, MAX_STEPS)
    if sigmas and steps != len(sigmas):
        raise RequestError(
            f"num_inference_steps is {steps}, but sigmas has {len(sigmas)} entries, one per step; leave one of them out"
        )
    return steps


def resolve_seed(request: GenerationRequest) -> int:
    """The seed as asked, or one that is drawn. Beside latents it is for what else is drawn, 0 if none is given, and
    refused where nothing is."""
    if request.latents is not None:
        if request.seed is None:
            return 0
        if request.hires is None and not resolve_diversity(request.diversity):
            raise RequestError(
                "seed and latents are both given, and without hires or diversity latents leave the seed nothing to do; "
                "drop one"
            )
    if request.seed is None:
        return secrets.randbelow(MAX_SEED + 1)
    return integer("seed", request.seed, 0, MAX_SEED)


def resolve_guidance(request: GenerationRequest, variant: Variant) -> Guidance:
    """Guidance as asked or as the variant has it; refused where the model has none or it would do nothing."""
    scale = number("guidance_scale", _or(request.guidance_scale, variant.guidance_scale), 0.0, math.inf)
    if scale > 0 and not variant.supports_guidance:
        raise RequestError(
            f"guidance_scale must be 0 for {variant.title}, got {scale:g}: it was distilled without guidance; "
            "leave guidance_scale out, or use the base model"
        )
    asked = _or(request.cfg_normalization, variant.cfg_normalization)
    normalization = number("cfg_normalization", float(asked) if isinstance(asked, bool) else asked, 0.0, math.inf)
    truncation = number("cfg_truncation", _or(request.cfg_truncation, variant.cfg_truncation), 0.0, 1.0)
    inert = {
        "a negative prompt": bool(request.negative_prompt) or request.negative_prompt_embeds is not None,
        "cfg_normalization": normalization > 0,
        "cfg_truncation": truncation < 1,
    }
    useless = [name for name, given in inert.items() if given and scale == 0]
    if useless:
        remedy = "raise guidance_scale above 0" if variant.supports_guidance else "leave it out, or use the base model"
        raise RequestError(f"{useless[0]} has no effect on {variant.title} without guidance; {remedy}")
    return Guidance(scale, normalization, truncation)


def resolve_tensors(request: GenerationRequest, height: int, width: int, limits: Limits) -> Mapping[str, Tensor]:
    """Copies of the tensors that were given, by argument name, checked for shape and values: whoever gave them may fill
    them anew before the picture begins. Latents have a batch axis of 1."""
    tensors: dict[str, Tensor] = {}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        value = getattr(request, name)
        if value is None:
            continue
        finite_tensor(name, value, f"(tokens, {limits.caption_features})")
        if value.ndim != 2 or value.shape[1] != limits.caption_features:
            raise RequestError(f"{name} must be a tensor (tokens, {limits.caption_features}), got {shown(value)}")
        if not 1 <= value.shape[0] <= limits.max_sequence_length:
            raise RequestError(f"{name} must have 1 to {limits.max_sequence_length} tokens, got {value.shape[0]}")
        tensors[name] = value.detach().clone()
    if request.latents is not None:
        shape = (limits.latent_channels, height // limits.latent_scale, width // limits.latent_scale)
        finite_tensor("latents", request.latents, str(shape))
        if tuple(request.latents.shape) not in (shape, (1, *shape)):
            raise RequestError(f"latents must be {shape} for {width}x{height}, got {shown(request.latents)}")
        tensors["latents"] = request.latents.detach().clone().reshape(1, *shape)
    return tensors


def resolve_adapters(adapters: Mapping[str, float] | None) -> tuple[tuple[str, float], ...]:
    """Names and strengths of the adapters that act, sorted by name; those of strength 0 do not."""
    if adapters is None:
        return ()
    if not isinstance(adapters, Mapping) or len(adapters) > MAX_ADAPTERS:
        raise RequestError(
            f"adapters must map up to {MAX_ADAPTERS} names to strengths, like {{'ink': 0.8}}, got {shown(adapters)}"
        )
    strengths = {adapter_name(name): strength(f"the strength of {name!r}", value) for name, value in adapters.items()}
    return tuple(sorted((name, value) for name, value in strengths.items() if value))


def adapter_name(name: Any) -> str:
    """`name`, if adapters may be called so."""
    if not isinstance(name, str) or not 1 <= len(name) <= 64 or not name.isprintable() or name != name.strip():
        raise RequestError(f"an adapter's name must be a text of 1 to 64 printable characters, got {shown(name)}")
    return name


def strength(name: str, value: Any) -> float:
    """How much of an adapter acts: 1 as it was trained, below 0 the opposite."""
    return number(name, value, -MAX_STRENGTH, MAX_STRENGTH)


def rounds_attention(backend: str) -> bool:
    """Whether a backend of attention multiplies in 8 bits, so that pictures differ by more than their last bits."""
    return backend == "float8" or "sage" in backend


def resolve_diversity(asked: Any) -> float:
    """How far caption features are moved in the first steps; 0 is not at all."""
    return 0.0 if asked is None else number("diversity", asked, 0.0, MAX_DIVERSITY)


def _or(asked: Any, default: Any) -> Any:
    return default if asked is None else asked


def finite_tensor(name: str, value: Any, shape: str) -> None:
    if not is_tensor(value) or not value.is_floating_point():
        raise RequestError(f"{name} must be a floating-point torch tensor {shape}, got {shown(value)}")
    if getattr(value, "is_meta", False) or str(getattr(value, "layout", _DENSE)) != _DENSE:
        raise RequestError(f"{name} must be a dense tensor {shape} with values, got a sparse one or one on 'meta'")
    if not bool(value.isfinite().all()):
        raise RequestError(f"{name} has values that are not finite (NaN or infinity); check where they come from")


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: Python and JSON can hold halves of surrogate pairs, which cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_tensor(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("isfinite", "is_floating_point", "shape", "ndim"))


def integer(name: str, value: Any, minimum: int, maximum: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise RequestError(f"{name} must be a whole number, got {shown(value)}") from None
    if isinstance(value, bool) or not minimum <= number <= maximum:
        came = value if abs(number) < _LONGEST else "one of more than 30 digits"
        raise RequestError(f"{name} must be a whole number from {minimum} to {maximum}, got {came}")
    return number


def flag(name: str, value: Any) -> bool:
    if not isinstance(plain(value), bool):
        raise RequestError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def number(name: str, value: Any, minimum: float, maximum: float) -> float:
    upper = "up" if maximum == math.inf else f"to {maximum:g}"
    try:
        number = float(value) if not isinstance(value, bool | str) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or not minimum <= number <= maximum:
        raise RequestError(f"{name} must be a number from {minimum:g} {upper}, got {shown(value)}")
    return number


def shown(value: Any) -> str:
    if is_tensor(value) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
