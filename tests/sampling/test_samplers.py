"""Samplers: order of convergence where the solution is known, diffusers' own steps, evaluations, and their protocol.

Gaussian data N(mean, deviation²) makes the flow exact: with `x = (1 − sigma)·image + sigma·noise` a path is
`x(sigma) = (1 − sigma)·mean + √((1 − sigma)²·deviation² + sigma²)·z` for a fixed z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from zimage.rules import SAMPLERS as NAMES
from zimage.sampling.samplers import SAMPLERS, Sampler, SamplerStep, dpmpp_2m, euler, heun, sample
from zimage.sampling.schedule import shifted_sigmas

MEAN, DEVIATION = 0.7, 0.5
Z = torch.tensor([-1.3, 0.4, 2.1], dtype=torch.float64).reshape(1, 3, 1, 1)
ORDERS = {"euler": 1, "heun": 2, "dpmpp_2m": 2}
EVALUATIONS: dict[str, Callable[[int], int]] = {
    "euler": lambda steps: steps,
    "heun": lambda steps: 2 * steps - 1,
    "dpmpp_2m": lambda steps: steps,
}


def deviation(sigma: float) -> float:
    return math.sqrt((1 - sigma) ** 2 * DEVIATION**2 + sigma**2)


def path(sigma: float) -> Tensor:
    return (1 - sigma) * MEAN + deviation(sigma) * Z


def gaussian_velocity(latents: Tensor, sigma: float) -> Tensor:
    """d path / d sigma for the path through `latents`."""
    z = (latents - (1 - sigma) * MEAN) / deviation(sigma)
    return -MEAN + (sigma - (1 - sigma) * DEVIATION**2) / deviation(sigma) * z


def wavy_velocity(latents: Tensor, sigma: float) -> Tensor:
    """A flow with nothing special about it."""
    return torch.sin(3 * latents + 5 * sigma) - 0.5 * latents * sigma


def run(sampler: Sampler, sigmas: Sequence[float], latents: Tensor, velocity: Callable = gaussian_velocity) -> Tensor:
    *_, last = sample(sampler, velocity, latents, sigmas)
    return last.latents


def errors(sampler: Sampler, schedules: Sequence[Sequence[float]]) -> list[float]:
    return [(run(sampler, sigmas, path(sigmas[0])) - path(sigmas[-1])).abs().max().item() for sigmas in schedules]


def order(counts: Sequence[int], errors_: Sequence[float]) -> float:
    """Slope of the error over the step count, both in logarithms, with its sign changed."""
    return -float(np.polyfit(np.log(counts), np.log(errors_), 1)[0])


def whole(steps: int, shift: float) -> list[float]:
    """From 1 to 0 as `shifted_sigmas`, in float64."""
    levels = np.linspace(1, 1 / steps, steps)
    return [*(shift * levels / (1 + (shift - 1) * levels)).tolist(), 0.0]


def test_requests_name_these_samplers() -> None:
    assert tuple(SAMPLERS) == NAMES


@pytest.mark.parametrize("name", SAMPLERS)
def test_order_between_two_noise_levels(name: str) -> None:
    counts = [16, 32, 64, 128, 256]
    found = order(counts, errors(SAMPLERS[name], [np.linspace(0.9, 0.1, count + 1).tolist() for count in counts]))
    assert found == pytest.approx(ORDERS[name], abs=0.05)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_order_from_noise_to_image(name: str, shift: float) -> None:
    counts = [128, 256, 512]
    found = order(counts, errors(SAMPLERS[name], [whole(count, shift) for count in counts]))
    assert found == pytest.approx(ORDERS[name], abs=0.05)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_order_of_dpmpp_2m_from_noise_to_image(shift: float) -> None:
    """Second order times a logarithm: in lambda, which is infinite at both ends, no number of steps is uniform."""
    counts = [256, 512, 1024, 2048]
    found = errors(dpmpp_2m, [whole(count, shift) for count in counts])
    scaled = [error * count**2 / math.log(count) for count, error in zip(counts, found, strict=True)]
    assert 1.6 < order(counts, found) < 2.0
    assert abs(order(counts, scaled)) < 0.25
    assert all(
        error < first for error, first in zip(found, errors(euler, [whole(n, shift) for n in counts]), strict=True)
    )


@pytest.mark.parametrize(("steps", "share"), [(8, 0.9), (16, 0.5), (28, 0.3), (50, 0.2)])
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_second_order_pays_at_the_step_counts_in_use(name: str, steps: int, share: float) -> None:
    schedule = [whole(steps, 3.0)]
    assert errors(SAMPLERS[name], schedule)[0] < share * errors(euler, schedule)[0]


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("name", SAMPLERS)
def test_straight_paths_are_exact(name: str, steps: int) -> None:
    """Data that is one point: the velocity is constant along a path, and the image is known from the first step on."""
    image, noise = torch.full_like(Z, MEAN), Z
    sigmas = whole(steps, 3.0)
    for step in sample(SAMPLERS[name], lambda latents, sigma: (latents - image) / sigma, noise, sigmas):
        torch.testing.assert_close(step.denoised, image, rtol=0, atol=1e-12)
        expected = (1 - step.sigma_next) * image + step.sigma_next * noise
        torch.testing.assert_close(step.latents, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shift", [3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 4, 8, 50])
def test_euler_has_the_bits_of_diffusers_scheduler(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(steps), device="cpu")
    scheduler.set_begin_index(0)
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = latents
    for step, time in zip(
        sample(euler, wavy_velocity, latents, shifted_sigmas(steps, shift).tolist()), scheduler.timesteps, strict=True
    ):
        theirs = scheduler.step(wavy_velocity(theirs, step.sigma), time, theirs, return_dict=False)[0]
        assert torch.equal(step.latents, theirs)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("steps", [2, 3, 10, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpmpp_2m_takes_the_steps_of_diffusers_solver(steps: int, shift: float) -> None:
    """Its own schedule begins below sigma 1 and is used for both."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, algorithm_type="dpmsolver++"
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    assert sigmas[0] < 1
    assert sigmas[-1] == 0
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = latents
    for step, time in zip(sample(dpmpp_2m, wavy_velocity, latents, sigmas), scheduler.timesteps, strict=True):
        theirs = scheduler.step(wavy_velocity(theirs, step.sigma), time, theirs, return_dict=False)[0]
        torch.testing.assert_close(step.latents, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_evaluations(name: str, steps: int) -> None:
    asked: list[float] = []

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return gaussian_velocity(latents, sigma)

    sigmas = whole(steps, 3.0)
    taken = list(sample(SAMPLERS[name], velocity, path(1.0), sigmas))
    assert len(taken) == steps
    assert len(asked) == EVALUATIONS[name](steps)
    assert set(asked) == set(sigmas[:-1]), "the model is never asked at sigma 0"


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_say_where_they_are(name: str) -> None:
    sigmas = whole(4, 3.0)
    taken = list(sample(SAMPLERS[name], gaussian_velocity, path(1.0), sigmas))
    assert [step.index for step in taken] == [0, 1, 2, 3]
    assert [step.sigma for step in taken] == sigmas[:-1]
    assert [step.sigma_next for step in taken] == sigmas[1:]
    first = path(1.0) - gaussian_velocity(path(1.0), 1.0)
    torch.testing.assert_close(taken[0].denoised, first)
    before = taken[1].latents
    torch.testing.assert_close(taken[2].denoised, before - sigmas[2] * gaussian_velocity(before, sigmas[2]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_step_ends_at_what_it_denoised(name: str) -> None:
    *_, last = sample(SAMPLERS[name], gaussian_velocity, path(1.0), whole(5, 3.0))
    torch.testing.assert_close(last.latents, last.denoised, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sent_latents_replace_the_current_ones(name: str) -> None:
    """And nothing is left of the old ones: the run goes on as one that starts from those sent."""
    sigmas = whole(5, 3.0)
    steps = sample(SAMPLERS[name], wavy_velocity, path(1.0), sigmas)
    next(steps)
    next(steps)
    sent = path(0.3)
    went_on = [steps.send(sent), next(steps), next(steps)]
    fresh = list(sample(SAMPLERS[name], wavy_velocity, sent, sigmas[2:]))
    for step, expected in zip(went_on, fresh, strict=True):
        assert torch.equal(step.latents, expected.latents)
        assert torch.equal(step.denoised, expected.denoised)


@pytest.mark.parametrize("name", SAMPLERS)
def test_two_runs_share_nothing(name: str) -> None:
    sigmas = whole(4, 3.0)
    alone = [step.latents for step in sample(SAMPLERS[name], wavy_velocity, path(1.0), sigmas)]
    one = sample(SAMPLERS[name], wavy_velocity, path(1.0), sigmas)
    other = sample(SAMPLERS[name], wavy_velocity, path(0.5), sigmas)
    for (step, _), expected in zip(zip(one, other, strict=True), alone, strict=True):
        assert torch.equal(step.latents, expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_tensor_is_changed(name: str) -> None:
    start = path(1.0)
    seen: list[tuple[Tensor, Tensor]] = [(start, start.clone())]

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        result = wavy_velocity(latents, sigma)
        seen.extend([(latents, latents.clone()), (result, result.clone())])
        return result

    sigmas = whole(4, 3.0)
    copied = list(sigmas)
    for step in sample(SAMPLERS[name], velocity, start, sigmas):
        seen.extend([(step.latents, step.latents.clone()), (step.denoised, step.denoised.clone())])
    assert all(torch.equal(tensor, copy) for tensor, copy in seen)
    assert sigmas == copied


@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_stay_in_float32(name: str) -> None:
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    steps: list[SamplerStep] = list(sample(SAMPLERS[name], wavy_velocity, latents, whole(3, 6.0)))
    assert {step.latents.dtype for step in steps} == {step.denoised.dtype for step in steps} == {torch.float32}


@pytest.mark.parametrize("sampler", [euler, heun, dpmpp_2m])
def test_reads_nothing_back(sampler: Sampler) -> None:
    with FakeTensorMode():
        steps = list(sample(sampler, wavy_velocity, torch.empty(1, 16, 4, 4), whole(3, 3.0)))
    assert len(steps) == 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_single_step_is_the_image_predicted_from_noise(name: str) -> None:
    (step,) = sample(SAMPLERS[name], wavy_velocity, Z, [1.0, 0.0])
    torch.testing.assert_close(step.latents, Z - wavy_velocity(Z, 1.0))


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_a_velocity_that_is_a_line_in_sigma_is_predicted_exactly(name: str) -> None:
    sigmas, slope = whole(12, 3.0), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64).reshape(1, 3, 1, 1)
    asked: list[float] = []

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return 1.0 + sigma * slope

    (*_, every), (*_, some) = (sample(SAMPLERS[name], velocity, Z, sigmas, cache) for cache in ((), (0, 1, 5)))
    torch.testing.assert_close(some.latents, every.latents, rtol=0, atol=1e-12)
    assert asked == [*sigmas[:-1], sigmas[0], sigmas[1], sigmas[5]]


def test_predictions_are_made_from_the_last_two_evaluations() -> None:
    sigmas = whole(8, 3.0)
    steps = list(sample(euler, wavy_velocity, Z, sigmas, (0, 1, 3)))
    (earlier, before), (later, last) = steps[3].slopes
    assert (earlier, later) == (sigmas[1], sigmas[3])
    assert torch.equal(before, wavy_velocity(steps[0].latents, sigmas[1]))
    assert torch.equal(last, wavy_velocity(steps[2].latents, sigmas[3]))
    slope = (steps[6].latents - steps[5].latents) / (sigmas[7] - sigmas[6])
    line = last + (sigmas[6] - later) * (last - before) / (later - earlier)
    torch.testing.assert_close(slope, line, rtol=0, atol=1e-12)
    assert all(steps[index].slopes is steps[3].slopes for index in range(4, 8))


def test_steps_that_no_two_evaluations_led_to_are_evaluated() -> None:
    run, asked = None, []

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return wavy_velocity(latents, sigma)

    sigmas = whole(9, 3.0)
    run = sample(euler, velocity, Z, sigmas, (0, 1))
    for _ in range(4):
        next(run)
    run.send(Z * 0.5)
    list(run)
    assert asked == [sigmas[0], sigmas[1], sigmas[4], sigmas[5]]
