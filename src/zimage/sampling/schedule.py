"""Noise levels of a sampling run. Pure functions; knows neither models nor requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..editing import skipped_steps

APART = 1e-5
"""Noise levels that are nearer are one level, rounded twice: a tenth of the nearest two of a schedule of 1000 steps."""


def shifted_sigmas(
    steps: int, shift: float, sigmas: Sequence[float] = (), strength: float = 1.0, keep_steps: bool = False
) -> Tensor:
    """Noise levels (steps + 1,) in float32 on the CPU, from at most 1 down to the final 0.

    `linspace(1, 1/steps, steps)`, or the given `sigmas` in its place, goes through the static shift
    `shift·s / (1 + (shift − 1)·s)` (Stable Diffusion 3, arXiv 2403.03206, eq. 23). The operations and their order
    are those of diffusers' Z-Image pipeline and FlowMatchEulerDiscreteScheduler, so that the bits are too.

    Below `strength` 1 an image is ahead of the first steps, and their levels are left out; or, with `keep_steps`, all
    levels are brought down to it before the shift.
    """
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are set to
    levels = torch.tensor(sigmas, **kind) if len(sigmas) else torch.linspace(1.0, 1.0 / steps, steps, **kind)
    if keep_steps:
        levels = strength * levels
    levels = shift * levels / (1 + (shift - 1) * levels)
    levels = levels[skipped_steps(steps, strength, keep_steps) :]
    return torch.cat([levels, torch.zeros(1, **kind)])


def levels_down_to(levels: Tensor, sigma: float) -> Tensor:
    """The beginning of a schedule, (steps + 1,): all levels above `sigma`, and that one in place of the first that is
    not."""
    return torch.cat([levels[levels > sigma + APART], levels.new_tensor([sigma])])


def levels_from(levels: Tensor, sigma: float) -> Tensor:
    """The end of a schedule, (steps + 1,): `sigma`, and all levels below it."""
    return torch.cat([levels.new_tensor([sigma]), levels[levels < sigma - APART]])


def model_timesteps(sigmas: Tensor) -> Tensor:
    """The model's time `1 − sigma` of each noise level, rounded as in diffusers (through thousandths)."""
    return (1000.0 - sigmas * 1000.0) / 1000.0
