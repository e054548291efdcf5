"""What is known of a picture stays through the steps of every sampler, and the rest is as without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zimage.sampling.known import Known, keeping, noised
from zimage.sampling.samplers import SAMPLERS, SamplerStep, sample
from zimage.sampling.schedule import shifted_sigmas

SIGMAS = shifted_sigmas(6, 3.0).tolist()


def random(seed: int) -> Tensor:
    return torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(seed))


IMAGE, NOISE, REPAINT = random(1), random(2), random(3)[:, :1] > 0


def velocity(latents: Tensor, sigma: float) -> Tensor:
    """Of each value by itself, so that what is repainted does not see the rest."""
    return torch.sin(3 * latents) + sigma


def run(name: str, known: Known | None, evaluated: tuple[int, ...] = ()) -> list[SamplerStep]:
    sampler = SAMPLERS[name] if known is None else keeping(SAMPLERS[name], known)
    return list(sample(sampler, velocity, noised(IMAGE, NOISE, SIGMAS[0]), SIGMAS, evaluated))


def test_noise_levels() -> None:
    assert torch.equal(noised(IMAGE, NOISE, 0.0), IMAGE)
    assert torch.equal(noised(IMAGE, NOISE, 1.0), NOISE)
    torch.testing.assert_close(noised(IMAGE, NOISE, 0.25), 0.25 * NOISE + 0.75 * IMAGE)


@pytest.mark.parametrize(
    ("name", "evaluated"),
    [("euler", ()), ("heun", ()), ("dpmpp_2m", ()), ("euler", (0, 1, 3)), ("dpmpp_2m", (0, 1, 4))],
)
def test_what_is_known_stays_and_the_rest_is_free(name: str, evaluated: tuple[int, ...]) -> None:
    kept, free = run(name, Known(IMAGE, NOISE, REPAINT), evaluated), run(name, None, evaluated)
    assert len(kept) == len(free) == 6
    repaint, stays = REPAINT.expand_as(IMAGE), ~REPAINT.expand_as(IMAGE)
    for one, other in zip(kept, free, strict=True):
        assert torch.equal(one.latents[repaint], other.latents[repaint])
        assert torch.equal(one.latents[stays], noised(IMAGE, NOISE, one.sigma_next)[stays])
        assert torch.equal(one.denoised[stays], IMAGE[stays])
        assert not torch.equal(other.latents[stays], one.latents[stays])
    assert torch.equal(kept[-1].latents[stays], IMAGE[stays])
