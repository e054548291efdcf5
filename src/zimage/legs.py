"""The two parts of a relay's picture: the request of each, the noise levels that each goes along, and what it costs.

The base model goes down its own schedule until the handover, Turbo down its own from there. Both keep
`x = (1 − sigma)·image + sigma·noise`, so what one leaves is what the other expects. Knows no weights and no files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from .callbacks import StepCallback, StepHook
from .calls import Call, as_request
from .denoiser import schedule
from .errors import RequestError
from .files.relayed import SHARED
from .request import AnyRequest, GenerationRequest, ResolvedRequest
from .rules import MAX_STEPS, integer, number
from .sampling.guidance import is_guided
from .sampling.samplers import SAMPLERS, count_evaluations
from .sampling.schedule import APART, levels_down_to, levels_from, model_timesteps

HANDOVER, STEPS = 0.75, 25
"""The noise level where Turbo takes over, and the steps of the base model's whole schedule, where none are given;
docs/relay.md has what others give."""


class Levels(NamedTuple):
    """The noise levels (steps + 1,) of each model's part, float32 on the CPU; base ends where Turbo begins."""

    base: Tensor
    turbo: Tensor


@dataclass(frozen=True)
class RelayRequest:
    """One picture of a relay with everything decided: with the same weights it is the same picture.

    Args:
        base: what the base model is asked for, with its whole schedule.
        turbo: what Turbo is, also with its whole schedule; prompt, seed and size are the same.
        handover: the noise level, between 0 and 1, where the base model ends and Turbo begins.
    """

    base: ResolvedRequest
    turbo: ResolvedRequest
    handover: float

    def __post_init__(self) -> None:
        """Raises `RequestError` where the two are not of one picture, or that is from an image."""
        if self.base.image is not None:
            raise RequestError(
                "a relay starts from noise and image is given; pass it to relay.base or relay.turbo, or leave it out"
            )
        if self.turbo.control_image is not None:
            raise RequestError("in a relay a ControlNet steers the base model's part; ask base for the control image")
        if self.base.hires is not None or self.turbo.hires is not None:
            raise RequestError(
                "a relay makes no second pass and hires is given; make the picture without, and enlarge it with image="
            )
        for name in SHARED:
            if getattr(self.base, name) != getattr(self.turbo, name):
                raise RequestError(f"both models must be asked for one picture, and they have another {name}")

    @property
    def levels(self) -> Levels:
        """The noise levels of both parts; raises `RequestError` where one of them has no step."""
        handover = check_handover(self.handover)
        above, below = schedule(self.base), schedule(self.turbo)
        levels = Levels(levels_down_to(above, handover), levels_from(below, handover))
        for model, part in zip(("base", "Turbo"), levels, strict=True):
            if len(part) < 2:
                raise RequestError(
                    f"the relay's {model} part has no step: the noise levels go from {above.max():.3g} to 0 and the "
                    f"handover is {handover:g}; choose one between, more than {APART:g} from both"
                )
        return levels

    @property
    def steps(self) -> int:
        """Denoising steps of both models."""
        return sum(len(levels) - 1 for levels in self.levels)

    @property
    def evaluations(self) -> int:
        """Transformer evaluations of both models: a step of the base model with guidance is two."""
        return sum(
            _evaluations(request, levels) for request, levels in zip((self.base, self.turbo), self.levels, strict=True)
        )


@dataclass(frozen=True, eq=False)
class RelayOutput:
    """What a relay's call gives: `images` as in `ZImageOutput`, and `requests[k]` makes image k again.

    `stepped_down` says for each time that memory ran out meanwhile what is done with less since."""

    images: Any
    requests: tuple[RelayRequest, ...]
    stepped_down: tuple[str, ...] = ()

    def __getitem__(self, index: int) -> Any:
        """As in diffusers' outputs."""
        return (self.images,)[index]


@dataclass(frozen=True)
class RelayCall:
    """What the pictures of one call share: of each model, and the user's callback, of which `names` are the tensors."""

    base: Call
    turbo: Call
    callback: StepCallback | None = None
    names: tuple[str, ...] = ()

    def hook(self, pipeline: Any, taken: int) -> StepHook | None:
        """The callback for the part of the model in `pipeline`, before which so many steps were `taken`."""
        return StepHook.of(pipeline, self.callback, self.names, taken)


def check_handover(handover: float) -> float:
    """`handover`, if it is a noise level; raises `RequestError` otherwise."""
    return number("handover", handover, 0.0, 1.0)


def with_steps(request: AnyRequest | str) -> AnyRequest:
    """`request` for the base model's part, with `STEPS` where it leaves the schedule open."""
    asked = as_request(request)
    if isinstance(asked, ResolvedRequest) or asked.num_inference_steps is not None or asked.sigmas is not None:
        return asked
    return replace(asked, num_inference_steps=STEPS)


def finish_of(request: ResolvedRequest, turbo_steps: int | None) -> GenerationRequest:
    """What Turbo is asked for to finish the base model's picture; raises `RequestError` for wrong steps."""
    return GenerationRequest(
        request.prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=None if turbo_steps is None else integer("turbo_steps", turbo_steps, 1, MAX_STEPS),
        seed=request.seed,
        max_sequence_length=request.max_sequence_length,
        any_size=True,
    )


def _evaluations(request: ResolvedRequest, levels: Tensor) -> int:
    sigmas = levels.tolist()
    times = dict(zip(sigmas, model_timesteps(levels).tolist(), strict=True))

    def branches(sigma: float) -> int:
        return 2 if is_guided(times[sigma], request.guidance_scale, request.cfg_truncation) else 1

    return count_evaluations(SAMPLERS[request.sampler], sigmas, branches, request.cache)
