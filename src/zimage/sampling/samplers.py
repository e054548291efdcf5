"""Solvers of the probability-flow ODE `dx/dsigma = v(x, sigma)` as generators that the caller drives.

A sampler takes `velocity(latents, sigma)`, the starting latents and the noise levels, and yields a `SamplerStep`
after each step. Sending latents into it replaces the current ones. It keeps nothing outside its own frame and knows
nothing of models, prompts or guidance. Here `x = (1 − sigma)·image + sigma·noise`, so `image = x − sigma·v`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
"""`velocity(latents, sigma)`: noise minus image, as the model predicts it."""


@dataclass(frozen=True)
class SamplerStep:
    """A step taken: `latents` at `sigma_next`, and `denoised`, the image predicted at `sigma`; both (B, C, H, W)."""

    index: int
    sigma: float
    sigma_next: float
    latents: Tensor
    denoised: Tensor


Steps = Generator[SamplerStep, Tensor | None, None]
Sampler = Callable[[Velocity, Tensor, Sequence[float]], Steps]


def euler(velocity: Velocity, latents: Tensor, sigmas: Sequence[float]) -> Steps:
    """Euler's method: first order, one evaluation a step."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        slope = velocity(latents, sigma)
        denoised = latents - sigma * slope
        latents = latents + (sigma_next - sigma) * slope
        replaced = yield SamplerStep(index, sigma, sigma_next, latents, denoised)
        latents = latents if replaced is None else replaced


def heun(velocity: Velocity, latents: Tensor, sigmas: Sequence[float]) -> Steps:
    """Heun's method: second order, two evaluations a step and one for the last (arXiv 2206.00364, algorithm 1)."""
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        slope = velocity(latents, sigma)
        denoised = latents - sigma * slope
        ahead = latents + (sigma_next - sigma) * slope
        if sigma_next > 0:
            ahead = latents + (sigma_next - sigma) * 0.5 * (slope + velocity(ahead, sigma_next))
        latents = ahead
        replaced = yield SamplerStep(index, sigma, sigma_next, latents, denoised)
        latents = latents if replaced is None else replaced


def dpmpp_2m(velocity: Velocity, latents: Tensor, sigmas: Sequence[float]) -> Steps:
    """DPM-Solver++(2M) for flow matching: second order, one evaluation a step.

    arXiv 2211.01095, algorithm 2, with alpha = 1 − sigma and lambda = log(alpha / sigma). Where lambda is infinite
    (sigma 1 at the start, 0 at the end) the step falls back to the first order, as it does after replaced latents.
    """
    previous: Tensor | None = None
    previous_sigma = 1.0
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = latents - sigma * velocity(latents, sigma)
        target = denoised
        if previous is not None and previous_sigma < 1 and sigma_next > 0:
            span = _half_log_snr(sigma_next) - _half_log_snr(sigma)
            ratio = (_half_log_snr(sigma) - _half_log_snr(previous_sigma)) / span
            target = denoised + (denoised - previous) / (2 * ratio)
        decay = sigma_next / sigma
        latents = decay * latents + ((1 - sigma_next) - (1 - sigma) * decay) * target
        previous, previous_sigma = denoised, sigma
        replaced = yield SamplerStep(index, sigma, sigma_next, latents, denoised)
        if replaced is not None:
            latents, previous = replaced, None


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
"""The samplers by the names that requests use."""


def _half_log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)
