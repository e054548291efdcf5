"""Which denoising steps the model is evaluated in, where the others are predicted from those before (`cache=`).

Plain arithmetic over noise levels; the prediction itself is in `sampling/samplers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .arrays import plain
from .editing import skipped_steps
from .errors import RequestError
from .rules import integer, shown
from .variants import Variant

CACHES = ("balanced",)
ONE_EVALUATION = ("euler", "dpmpp_2m")
"""Samplers that look at one noise level in a step, which is what a prediction stands for."""
_ROUNDING = 1e-6
_FIRST = 4
_SKIPPED = ((0.85, 1), (0.6, 2), (0.0, 3))
"""Steps predicted between two evaluated ones, from that noise level up: what is decided early decides the picture."""


def resolve_cache(
    cache: str | Sequence[int] | None, variant: Variant, *, sampler: str, levels: Sequence[float], truncation: float
) -> tuple[int, ...]:
    """The steps that are evaluated, of those at the noise `levels`; () is all of them.

    Raises `RequestError` where nothing would be skipped, or a step cannot be predicted.
    """
    if cache is None:
        return ()
    if not variant.supports_cache:
        raise RequestError(
            f"cache has no use on {variant.title}: each of its few steps counts; leave it out, or use the base model"
        )
    if sampler not in ONE_EVALUATION:
        came = f"{sampler!r}, the model's own" if sampler == variant.sampler else f"sampler={sampler!r}"
        raise RequestError(
            f"cache predicts steps of one evaluation ({' and '.join(ONE_EVALUATION)}), got {came}; "
            f"pass sampler={ONE_EVALUATION[0]!r}, or leave cache out"
        )
    needed, cache = _needed(levels, truncation), plain(cache)
    if isinstance(cache, str):
        if cache not in CACHES:
            raise RequestError(f"cache must be {' or '.join(map(repr, CACHES))} or a list of steps, got {cache!r}")
        steps = _balanced(levels, needed)
    else:
        steps = _listed(cache, len(levels), needed)
    if len(steps) == len(levels):
        raise RequestError(f"cache skips none of {len(levels)} steps; leave it out, or take more steps")
    return steps


def noise_levels(
    steps: int, shift: float, sigmas: Sequence[float], strength: float = 1.0, keep_steps: bool = False
) -> list[float]:
    """The noise levels that a run of so many steps begins them at, as `sampling.schedule` has them but for rounding."""
    scale = strength if keep_steps else 1.0
    levels = [scale * level for level in sigmas or [1 - index / steps for index in range(steps)]]
    return [shift * level / (1 + (shift - 1) * level) for level in levels[skipped_steps(steps, strength, keep_steps) :]]


def _needed(levels: Sequence[float], truncation: float) -> set[int]:
    """Steps that cannot be predicted: the first two, and the first two without guidance where `truncation` ends it.

    Where that is may depend on rounding, by one step, so there it is three.
    """
    ends = [index for index, level in enumerate(levels) if 1 - level > truncation - _ROUNDING][:1]
    needed = {0, 1}.union(*(range(end, end + 3) for end in ends))
    return needed & set(range(len(levels)))


def _balanced(levels: Sequence[float], needed: set[int]) -> tuple[int, ...]:
    last = len(levels) - 1
    steps: list[int] = []
    skipped = 0
    for index in range(len(levels)):
        most = 0 if index < _FIRST else next(count for above, count in _SKIPPED if levels[steps[-1]] >= above)
        if index in needed or index == last or skipped == most:
            steps.append(index)
            skipped = 0
        else:
            skipped += 1
    return tuple(steps)


def _listed(cache: Any, count: int, needed: set[int]) -> tuple[int, ...]:
    if not isinstance(cache, Sequence):
        raise RequestError(f"cache must be {' or '.join(map(repr, CACHES))} or a list of steps, got {shown(cache)}")
    steps = tuple(integer("each step of cache", step, 0, count - 1) for step in cache)
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise RequestError("the steps of cache must ascend; sort them, without repetition")
    if missing := sorted(needed - set(steps)):
        raise RequestError(
            f"cache must have the steps {', '.join(map(str, missing))}: a prediction needs evaluations in a row before "
            "it, at the start and where guidance ends"
        )
    return steps
