"""Guidance: its formula in float32, the cap on its norm image by image, and when it acts."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zimage.sampling.guidance import guide, is_guided


def predictions(count: int = 2, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 16, 4, 6, generator=generator), torch.randn(count, 16, 4, 6, generator=generator)


def test_by_hand() -> None:
    positive, negative = torch.tensor([[[[3.0, 1.0]]]]), torch.tensor([[[[1.0, 2.0]]]])
    assert guide(positive, negative, 4.0).tolist() == [[[[11.0, -3.0]]]]
    assert guide(positive, negative, 0.0).tolist() == positive.tolist()
    assert guide(positive, positive, 7.0).tolist() == positive.tolist()


def test_is_the_weighted_mean_that_other_tools_write() -> None:
    """`negative + c·(positive − negative)` with c = scale + 1."""
    positive, negative = predictions()
    torch.testing.assert_close(guide(positive, negative, 3.0), negative + 4.0 * (positive - negative))


def test_works_in_float32() -> None:
    positive, negative = (tensor.bfloat16() for tensor in predictions())
    guided = guide(positive, negative, 4.0)
    assert guided.dtype == torch.float32
    assert torch.equal(guided, guide(positive.float(), negative.float(), 4.0))
    large = torch.full((1, 1, 1, 2), 60000.0, dtype=torch.float16)
    assert guide(large, -large, 4.0).tolist() == [[[[540000.0, 540000.0]]]]


@pytest.mark.parametrize("cap", [0.3, 1.0, 2.0])
def test_normalization_caps_the_norm_and_keeps_the_direction(cap: float) -> None:
    positive, negative = predictions(3)
    free, capped = guide(positive, negative, 4.0), guide(positive, negative, 4.0, cap)
    for index in range(3):
        limit = cap * positive[index].norm()
        assert free[index].norm() > limit
        assert capped[index].norm().item() == pytest.approx(limit.item(), rel=1e-5)
        cosine = torch.cosine_similarity(free[index].flatten(), capped[index].flatten(), dim=0)
        assert cosine.item() == pytest.approx(1.0, abs=1e-5)


def test_normalization_below_the_cap_changes_no_bit() -> None:
    positive, negative = predictions()
    assert torch.equal(guide(positive, negative, 0.5, 100.0), guide(positive, negative, 0.5))


def test_normalization_is_per_image() -> None:
    positive, negative = predictions(2)
    negative = torch.stack([-negative[0], positive[1]])
    capped = guide(positive, negative, 4.0, 1.0)
    assert torch.equal(capped[1], positive[1])
    assert torch.equal(capped[:1], guide(positive[:1], negative[:1], 4.0, 1.0))
    assert capped[0].norm().item() == pytest.approx(positive[0].norm().item(), rel=1e-5)


def test_normalization_of_zeros() -> None:
    """diffusers' pipeline takes `guided` as it is where its norm does not exceed the cap: 0 stays 0."""
    zero = torch.zeros(1, 2, 2, 2)
    assert torch.equal(guide(zero, zero, 4.0, 1.0), zero)
    assert torch.equal(guide(zero, torch.ones_like(zero), 4.0, 1.0), zero)


def test_a_nan_is_not_hidden_by_normalization() -> None:
    positive, negative = predictions(1)
    negative[0, 0, 0, 0] = math.nan
    assert guide(positive, negative, 4.0, 1.0).isnan().any()
    positive[0, 0, 0, 0] = math.inf
    assert not guide(positive, predictions(1)[1], 4.0, 1.0).isfinite().all()


@pytest.mark.parametrize("normalization", [0.0, 1.0])
def test_reads_nothing_back(normalization: float) -> None:
    with FakeTensorMode():
        positive, negative = torch.empty(1, 16, 4, 4), torch.empty(1, 16, 4, 4)
        assert guide(positive, negative, 4.0, normalization).shape == (1, 16, 4, 4)


@pytest.mark.parametrize("normalization", [0.0, 1.0])
def test_changes_nothing_it_was_given(normalization: float) -> None:
    positive, negative = predictions()
    before = positive.clone(), negative.clone()
    guide(positive, negative, 4.0, normalization)
    assert torch.equal(positive, before[0])
    assert torch.equal(negative, before[1])


@pytest.mark.parametrize(
    ("time", "scale", "truncation", "acts"),
    [
        (0.0, 4.0, 1.0, True),
        (1.0, 4.0, 1.0, True),
        (0.5, 0.0, 1.0, False),
        (0.5, 0.01, 1.0, True),
        (0.5, 4.0, 0.5, True),
        (math.nextafter(0.5, 1), 4.0, 0.5, False),
        (0.0, 4.0, 0.0, True),
        (1e-9, 4.0, 0.0, False),
    ],
)
def test_when_it_acts(time: float, scale: float, truncation: float, acts: bool) -> None:
    assert is_guided(time, scale, truncation) is acts
