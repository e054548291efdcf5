"""Noise levels and model times: the published numbers, and the bits of diffusers' scheduler for every step count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from zimage.sampling.schedule import APART, levels_down_to, levels_from, model_timesteps, shifted_sigmas


def reference(sigmas: list[float] | np.ndarray, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' noise levels, with the final 0, and the model times of all but that, as its pipeline forms them."""
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=sigmas, device="cpu", mu=1.15)
    return scheduler.sigmas, (1000 - scheduler.timesteps) / 1000


def test_turbo_schedule() -> None:
    sigmas = shifted_sigmas(8, 3.0)
    assert sigmas.tolist() == pytest.approx([1, 21 / 22, 0.9, 15 / 18, 0.75, 9 / 14, 0.5, 0.3, 0])
    assert sigmas.dtype == torch.float32
    assert model_timesteps(sigmas).tolist() == pytest.approx(
        [0, 1 / 22, 0.1, 3 / 18, 0.25, 5 / 14, 0.5, 0.7, 1], abs=1e-6
    )


def test_base_schedule() -> None:
    sigmas = shifted_sigmas(50, 6.0)
    assert len(sigmas) == 51
    assert sigmas[0] == 1
    assert sigmas[25].item() == pytest.approx(6 * 0.5 / 3.5)
    assert sigmas[-2].item() == pytest.approx(6 * 0.02 / 1.1)
    assert sigmas[-1] == 0


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_bits_of_diffusers(shift: float) -> None:
    for steps in range(1, 61):
        sigmas = shifted_sigmas(steps, shift)
        expected, times = reference(get_default_z_image_sigmas(steps), shift)
        assert torch.equal(sigmas, expected), steps
        assert torch.equal(model_timesteps(sigmas[:-1]), times), steps


@pytest.mark.parametrize("shift", [3.0, 6.0])
@pytest.mark.parametrize("given", [[1.0], [0.9, 0.5, 0.1], [0.3001, 0.3, 1e-4]])
def test_given_sigmas_take_the_same_way(given: list[float], shift: float) -> None:
    sigmas = shifted_sigmas(len(given), shift, given)
    expected, times = reference(given, shift)
    assert torch.equal(sigmas, expected)
    assert torch.equal(model_timesteps(sigmas[:-1]), times)


@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_descends_from_1_to_0(steps: int) -> None:
    sigmas = shifted_sigmas(steps, 6.0)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_a_schedule_is_divided_at_a_noise_level() -> None:
    sigmas = shifted_sigmas(8, 3.0)
    assert levels_down_to(sigmas, 0.7).tolist() == pytest.approx([1, 21 / 22, 0.9, 15 / 18, 0.75, 0.7])
    assert levels_from(sigmas, 0.7).tolist() == pytest.approx([0.7, 9 / 14, 0.5, 0.3, 0])
    for near in (0.9, 0.9 + 5e-6, 0.9 - 5e-6):  # one level, however it was rounded
        assert len(levels_down_to(sigmas, near)) == 3
        assert len(levels_from(sigmas, near)) == 7
    fine = shifted_sigmas(1000, 6.0)
    assert (fine[:-1] - fine[1:]).min() > 10 * APART
