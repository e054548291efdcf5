"""Solvers of the probability-flow ODE `dx/dsigma = v(x, sigma)`, each a pure function that takes one step.

A sampler takes `velocity(latents, sigma)`, the latents, the noise levels before and after the step, and the step before
it, if that led here; taking a step again gives the same bits. `sample` takes all steps of a schedule in turn, and may
predict the velocity of some from those before. Nothing here knows models, prompts or guidance.
`x = (1 − sigma)·image + sigma·noise`, so `image = x − sigma·v`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""`velocity(latents, sigma)`: noise minus image, as the model predicts it."""


@dataclass(frozen=True)
class SamplerStep:
    """A step taken: `latents` at `sigma_next`, and `denoised`, the image predicted at `sigma`; both (B, C, H, W).

    `slopes` has the last two evaluations that led here, each sigma and velocity, where later steps are predicted.
    """

    sigma: float
    sigma_next: float
    latents: Tensor
    denoised: Tensor
    index: int = 0
    slopes: tuple[tuple[float, Tensor], ...] = ()


Sampler = Callable[[Velocity, Tensor, float, float, SamplerStep | None], SamplerStep]
Steps = Generator[SamplerStep, Tensor | None, None]


def euler(
    velocity: Velocity, latents: Tensor, sigma: float, sigma_next: float, previous: SamplerStep | None = None
) -> SamplerStep:
    """Euler's method: first order, one evaluation a step."""
    slope = velocity(latents, sigma)
    return SamplerStep(sigma, sigma_next, latents + (sigma_next - sigma) * slope, latents - sigma * slope)


def heun(
    velocity: Velocity, latents: Tensor, sigma: float, sigma_next: float, previous: SamplerStep | None = None
) -> SamplerStep:
    """Heun's method: second order, two evaluations a step and one for the last (arXiv 2206.00364, algorithm 1)."""
    slope = velocity(latents, sigma)
    denoised = latents - sigma * slope
    ahead = latents + (sigma_next - sigma) * slope
    if sigma_next > 0:
        ahead = latents + (sigma_next - sigma) * 0.5 * (slope + velocity(ahead, sigma_next))
    return SamplerStep(sigma, sigma_next, ahead, denoised)


def dpmpp_2m(
    velocity: Velocity, latents: Tensor, sigma: float, sigma_next: float, previous: SamplerStep | None = None
) -> SamplerStep:
    """DPM-Solver++(2M) for flow matching: second order, one evaluation a step.

    arXiv 2211.01095, algorithm 2, with alpha = 1 − sigma and lambda = log(alpha / sigma). Where lambda is infinite
    (sigma 1 at the start, 0 at the end) or no step led here, it falls back to the first order.
    """
    denoised = latents - sigma * velocity(latents, sigma)
    target = denoised
    if previous is not None and previous.sigma < 1 and sigma_next > 0:
        span = _half_log_snr(sigma_next) - _half_log_snr(sigma)
        ratio = (_half_log_snr(sigma) - _half_log_snr(previous.sigma)) / span
        target = denoised + (denoised - previous.denoised) / (2 * ratio)
    decay = sigma_next / sigma
    moved = decay * latents + ((1 - sigma_next) - (1 - sigma) * decay) * target
    return SamplerStep(sigma, sigma_next, moved, denoised)


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
"""The samplers by the names that requests use."""


def for_step(sampler: Sampler, index: int, evaluated: Collection[int], previous: SamplerStep | None) -> Sampler:
    """`sampler` for step `index`, where only the steps `evaluated` need the model; empty is all of them.

    A step that two evaluations did not lead to is evaluated, whatever `evaluated` says.
    """
    if not evaluated:
        return sampler
    if index in evaluated or previous is None or len(previous.slopes) < 2:
        return partial(_evaluating, sampler)
    return partial(_predicting, sampler)


def sample(
    sampler: Sampler,
    velocity: Velocity,
    latents: Tensor,
    sigmas: Sequence[float],
    evaluated: Collection[int] = (),
) -> Steps:
    """Every step of a schedule; latents sent in replace the current ones, and no step has led to those."""
    previous = None
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        take = for_step(sampler, index, evaluated, previous)
        previous = replace(take(velocity, latents, sigma, sigma_next, previous), index=index)
        replaced = yield previous
        latents = previous.latents
        if replaced is not None:
            latents, previous = replaced, None


def count_evaluations(
    sampler: Sampler,
    sigmas: Sequence[float],
    per_evaluation: Callable[[float], int],
    evaluated: Collection[int] = (),
) -> int:
    """Evaluations of the model in a schedule, counted by driving the sampler with a stand-in for it.

    `per_evaluation` says how many there are at a noise level: two with guidance, else one.
    """
    counted = 0

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        nonlocal counted
        counted += per_evaluation(sigma)
        return latents

    for _ in sample(sampler, velocity, torch.zeros(1), sigmas, evaluated):
        pass
    return counted


def _evaluating(
    sampler: Sampler, velocity: Velocity, latents: Tensor, sigma: float, sigma_next: float, previous: SamplerStep | None
) -> SamplerStep:
    """`sampler`'s step, which remembers its evaluation and the one before."""
    slopes = [] if previous is None else [*previous.slopes]

    def remembered(latents: Tensor, sigma: float) -> Tensor:
        slopes.append((sigma, velocity(latents, sigma)))
        return slopes[-1][1]

    step = sampler(remembered, latents, sigma, sigma_next, previous)
    return replace(step, slopes=tuple(slopes[-2:]))


def _predicting(
    sampler: Sampler, velocity: Velocity, latents: Tensor, sigma: float, sigma_next: float, previous: SamplerStep
) -> SamplerStep:
    """`sampler`'s step with a velocity that lies on the line, in sigma, through the last two evaluations: the first
    order of arXiv 2503.06923's forecasts, of the whole model's result instead of each layer's."""
    (earlier, before), (later, last) = previous.slopes

    def predicted(latents: Tensor, sigma: float) -> Tensor:
        return last + (sigma - later) / (later - earlier) * (last - before)

    step = sampler(predicted, latents, sigma, sigma_next, previous)
    return replace(step, slopes=previous.slopes)


def _half_log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)
