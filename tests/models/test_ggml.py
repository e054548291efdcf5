"""The kinds that GGUF files store weights as: their numbers beside those of the `gguf` package, which defines them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import nn

from zimage.memory.sizes import GGML_BLOCKS
from zimage.models import ggml
from zimage.models.quantized import PackedLinear

KINDS = sorted(ggml.KINDS)
Bytes = npt.NDArray[np.uint8]


def packed(kind: str, rows: int, blocks: int, seed: int = 0) -> Bytes:
    """Rows of random blocks; their scales are random numbers too, not random bits, which may be infinite."""
    rng = np.random.default_rng(seed)
    count = GGML_BLOCKS[kind][1]
    content = rng.integers(0, 256, (rows * blocks, count), dtype=np.uint8)
    for place in ggml.KINDS[kind].halves:
        content[:, place : place + 2] = rng.normal(size=(len(content), 1)).astype(np.float16).view(np.uint8)
    return content.reshape(rows, -1)


def test_blocks_are_as_large_as_the_package_says() -> None:
    assert {kind: GGML_QUANT_SIZES[GGMLQuantizationType[kind]] for kind in KINDS} == GGML_BLOCKS


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_the_package(kind: str, seed: int) -> None:
    content = packed(kind, 5, 3, seed)
    expected = dequantize(content, GGMLQuantizationType[kind])
    found = ggml.widen(torch.from_numpy(content), kind, torch.float32)
    assert found.shape == (5, 3 * GGML_BLOCKS[kind][0])
    assert np.array_equal(found.numpy(), expected)
    assert ggml.packed_bytes(kind, found.shape[1]) == content.shape[1]
    narrow = ggml.widen(torch.from_numpy(content), kind, torch.bfloat16)
    assert torch.equal(narrow, found.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_comes_from_the_host_when_weights_are_widened(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.from_numpy(packed(kind, 5, 3))
    expected = ggml.widen(content, kind, torch.float32)
    monkeypatch.setattr(torch, "tensor", None)
    assert torch.equal(ggml.widen(content, kind, torch.float32), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_widened_some_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.from_numpy(packed(kind, 7, 2))
    whole = ggml.widen(content, kind, torch.float32)
    for piece in (1, 3 * whole.shape[1], 7 * whole.shape[1] - 1):
        monkeypatch.setattr(ggml, "PIECE", piece)
        assert torch.equal(ggml.widen(content, kind, torch.float32), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_seen_wherever_it_is(kind: str, value: float) -> None:
    assert ggml.are_finite(torch.from_numpy(packed(kind, 2, 2)), kind)
    for place in ggml.KINDS[kind].halves:
        content = packed(kind, 2, 2)
        last = content[1].reshape(2, -1)[1]
        last[place : place + 2] = np.array([value], dtype=np.float16).view(np.uint8)
        assert not ggml.are_finite(torch.from_numpy(content), kind)
        assert not torch.isfinite(ggml.widen(torch.from_numpy(content), kind, torch.float32)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_a_product_with_its_widened_weight(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        plain = nn.Linear(512, 3)
    layer = PackedLinear(plain, "Q4_K")
    assert layer.weight.shape == (3, 288)
    content = torch.from_numpy(packed("Q4_K", 3, 2))
    layer.weight = nn.Parameter(content, requires_grad=False)
    layer.bias = nn.Parameter(torch.randn(3).to(dtype))
    hidden = torch.randn(2, 5, 512).to(dtype)
    weight = ggml.widen(content, "Q4_K", dtype)
    assert torch.equal(layer(hidden), nn.functional.linear(hidden, weight, layer.bias))
    assert "in_features=512, out_features=3, kind=Q4_K" in repr(layer)
