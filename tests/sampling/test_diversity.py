"""Moved caption features: how far, by which noise, and in which steps."""

from __future__ import annotations

import pytest
import torch

from zimage.sampling.diversity import moved, moved_steps
from zimage.sampling.noise import seeded_noise

FEATURES = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0] * 4) + 3.0


@pytest.mark.parametrize(("steps", "first"), [(1, 1), (4, 1), (8, 1), (15, 1), (16, 2), (50, 6)])
def test_the_first_steps(steps: int, first: int) -> None:
    assert moved_steps(steps) == first


@pytest.mark.parametrize("diversity", [0.5, 2.0])
def test_features_are_moved_by_their_own_spread(diversity: float) -> None:
    differences = torch.stack([moved(FEATURES, seed, diversity) - FEATURES for seed in range(200)])
    spread = FEATURES.std(dim=0, correction=0)
    torch.testing.assert_close(differences.std(dim=(0, 1)), diversity * spread, rtol=0.05, atol=0.0)
    assert differences.mean(dim=(0, 1)).abs().max() < 0.1 * diversity * spread.max()


def test_each_seed_has_noise_of_its_own_and_not_that_of_the_picture() -> None:
    drawn = [moved(FEATURES, seed, 1.0) for seed in (0, 1, 2, 2**32 - 1)]
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == 4
    assert torch.equal(drawn[1], moved(FEATURES, 1, 1.0))
    for seed in range(50):
        noise = (moved(FEATURES, seed, 1.0) - FEATURES) / FEATURES.std(dim=0, keepdim=True, correction=0)
        assert (noise - seeded_noise(seed, FEATURES.shape)).abs().max() > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types_stay(dtype: torch.dtype) -> None:
    narrow = FEATURES.to(dtype)
    assert torch.equal(moved(narrow, 7, 1.0), moved(narrow.float(), 7, 1.0).to(dtype))


def test_a_single_token_has_no_spread() -> None:
    assert torch.equal(moved(FEATURES[:1], 7, 4.0), FEATURES[:1])
