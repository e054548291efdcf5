"""A second pass at a larger size (`hires=`): what is asked of it, and the requests that such a picture is made by.

Plain arithmetic over sizes and steps, no torch: `starting` enlarges what the first pass left, and the pipeline goes
through the passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from .editing import skipped_steps
from .errors import RequestError
from .memory.sizes import Demands, together
from .rules import Limits, check_area, number, shown

if TYPE_CHECKING:
    from .request import GenerationRequest, ResolvedRequest

UPSCALES = ("pixels", "latents")
MOST = 4.0
"""Times that a side may grow: of a picture that is larger, a pass at low strength has nothing to go by."""
STRENGTHS = {"pixels": 0.4, "latents": 0.6}
"""Where none is given, an estimate that was not measured on the released models. What was enlarged as latents is not
quite a picture, so more of it has to be made anew."""
OPTIONS = ("scale", "strength", "upscale")


@dataclass(frozen=True)
class Hires:
    """How a picture is made larger: enlarged, and denoised again from a low noise level.

    Args:
        scale: how many times as long each side becomes, above 1, to 4; sides stay multiples of 16.
        strength: above 0, to 1: how much of the schedule the second pass runs. By default 0.4, or 0.6 for latents.
        upscale: "pixels" decodes, enlarges and encodes the picture; "latents" enlarges its latents, in less time and
            memory.
        size: height and width that come of it, which a resolved request has.
    """

    scale: float = 2.0
    strength: float | None = None
    upscale: str = "pixels"
    size: tuple[int, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """What is asked, without what comes of it."""
        return {name: value for name, value in asdict(self).items() if name in OPTIONS}


def resolve_hires(request: GenerationRequest, sides: tuple[int, int], steps: int, limits: Limits) -> Hires | None:
    """What `request`, of height and width `sides`, asks of a second pass, with nothing left open; raises
    `RequestError` for what cannot work."""
    if request.hires is None:
        return None
    asked = _read(request.hires)
    if request.mask_image is not None or request.padding is not None:
        raise RequestError(
            "hires makes all of a picture anew, and a mask or padding keeps a part of it to the bit; leave one out, or "
            "enlarge the picture afterwards, with image="
        )
    scale = number("hires: its scale", asked.scale, 1.0, MOST)
    if asked.upscale not in UPSCALES:
        raise RequestError(f"hires: its upscale must be {' or '.join(UPSCALES)}, got {shown(asked.upscale)}")
    default = STRENGTHS[asked.upscale]
    strength = number("hires: its strength", default if asked.strength is None else asked.strength, 0.0, 1.0)
    if skipped_steps(steps, strength, False) == steps:
        raise RequestError(
            f"hires: strength {strength:g} leaves none of {steps} steps for the second pass; raise it to {1 / steps:g}"
        )
    step = limits.size_multiple
    height, width = (round(side * scale / step) * step for side in sides)
    if (height, width) == sides:
        raise RequestError(f"hires: {scale:g} times {width}x{height} is the same size; raise the scale")
    if max(height, width) > limits.max_side:
        raise RequestError(
            f"hires makes the picture {width}x{height}, and a side has at most {limits.max_side}; lower its scale"
        )
    if not request.any_size:
        check_area(height, width, limits, "Lower the scale of hires")
    return Hires(scale, strength, asked.upscale, (height, width))


def passes(request: ResolvedRequest) -> tuple[ResolvedRequest, ...]:
    """The requests that a picture is made by: itself, or with `hires` one for each pass, without.

    The second begins with what the first left, whatever that began with, and evaluates the model in each step.
    """
    if request.hires is None:
        return (request,)
    first, (height, width) = replace(request, hires=None), request.hires.size
    assert request.hires.strength is not None
    again = replace(
        first, height=height, width=width, strength=request.hires.strength, keep_steps=False, image=None, cache=(),
        diversity=0.0,
    )  # fmt: skip
    return first, again


def demands(request: ResolvedRequest) -> Demands:
    """What a plan needs to know of a picture, and of those that it passes through."""
    each, tokens = passes(request), request.max_sequence_length
    encodes = request.image is not None or request.control_image is not None
    encodes = encodes or (request.hires is not None and request.hires.upscale == "pixels")
    is_together = request.guidance_scale > 0 and request.control_image is None
    both = max(together(one.height, one.width, tokens) for one in each) if is_together else 0
    return Demands(each[-1].height, each[-1].width, tokens, encodes, both)


def _read(asked: Any) -> Hires:
    if isinstance(asked, Hires):
        return asked
    if isinstance(asked, Mapping) and set(asked) <= set(OPTIONS):
        return Hires(**asked)
    if not isinstance(asked, bool) and isinstance(asked, Real):
        return Hires(asked)  # type: ignore[arg-type]  # checked as a number with all else
    raise RequestError(f"hires must be how many times as large, or a zimage.Hires; got {shown(asked)}")
