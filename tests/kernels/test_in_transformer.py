"""The transformer with its kernels: the numbers it has without them, in every type, and what is hooked is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage import ZImagePipeline, ZImageWarning
from zimage.kernels import fused, rounding
from zimage.kernels.switch import using
from zimage.models.precision import Float32Math
from zimage.models.transformer import ZImageTransformer
from zimage.testing import build_checkpoint
from zimage.testing.configs import SIZES

pytestmark = pytest.mark.no_cover  # lines are counted in `test_fused`; here that doubles the time
DTYPES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""And how far apart two forwards may be, relative to their norm."""
NAMES = ("normalize", "add_normalized", "add_then_normalize", "rotate_normalized", "gate")


@pytest.fixture(scope="module")
def turbo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four blocks: one refiner of each kind and two layers, of which the last rounds no activations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", replace(SIZES["tiny"], n_refiner_layers=1))
        return build_checkpoint(tmp_path_factory.mktemp("checkpoints") / "turbo")


@pytest.fixture(scope="module")
def transformers(turbo_folder: Path, device: torch.device) -> dict[str, ZImageTransformer]:
    return {
        name: ZImagePipeline.from_pretrained(turbo_folder, dtype=name, device=device).transformer for name in DTYPES
    }


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was asked and gave a result."""
    counter: Counter[str] = Counter()

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = kernel(*args)
            counter[name] += result is not None
            return result

        return call

    for name in NAMES:
        monkeypatch.setattr(fused, name, counted(name, getattr(fused, name)))
    return counter


def forward(transformer: ZImageTransformer, device: torch.device) -> Tensor:
    """Two pictures of 9 tokens, filled up, with a caption each, through every block; in float32."""
    generator = torch.Generator().manual_seed(0)
    features, latents = (torch.randn(*shape, generator=generator).to(device) for shape in ((5, 64), (2, 16, 6, 6)))
    caption = transformer.encode_caption(features)
    grid = transformer.grid(6, 6, caption.length)
    (modulation,) = transformer.modulations(torch.tensor([[0.3, 0.6]], device=device))
    return transformer.denoise(latents, caption, grid, modulation).float()


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forward_is_that_without_kernels(
    transformers: dict[str, ZImageTransformer], device: torch.device, kernels: Counter[str], dtype: str
) -> None:
    transformer = transformers[dtype]
    with using("off"):
        expected = forward(transformer, device)
    assert not kernels
    with using("on"):
        result = forward(transformer, device)
    assert torch.cosine_similarity(result.flatten(), expected.flatten(), dim=0).item() >= 0.9999
    assert distance(result, expected) <= DTYPES[dtype]
    blocks = len(transformer.context_refiner) + len(transformer.noise_refiner) + len(transformer.layers)
    assert kernels == dict.fromkeys(NAMES, blocks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_math_is_that_without_kernels(
    transformers: dict[str, ZImageTransformer], device: torch.device, kernels: Counter[str], dtype: str
) -> None:
    with Float32Math(), using("off"):
        expected = forward(transformers[dtype], device)
    with Float32Math(), using("on"):
        result = forward(transformers[dtype], device)
    assert distance(result, expected) <= 1e-5
    assert min(kernels[name] for name in NAMES) > 0


def test_what_is_hooked_is_called(own_turbo: ZImagePipeline, device: torch.device, kernels: Counter[str]) -> None:
    """By torch, also where a fused kernel would have done it with something else; the rest stays fused."""
    transformer = own_turbo.transformer.to(device)
    block, calls = transformer.layers[0], Counter[str]()
    watched = {
        "attention_norm1": block.attention_norm1,
        "attention_norm2": block.attention_norm2,
        "norm_q": block.attention.norm_q,
        "w1": block.feed_forward.w1,
    }
    kept: list[Tensor] = []
    for name, module in watched.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: calls.update([name]))
    block.feed_forward.w1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with using("off"):
        expected = forward(transformer, device)
    before = kept.pop().clone()
    with using("on"):
        result = forward(transformer, device)
    assert calls == dict.fromkeys(watched, 2)
    assert distance(result, expected) <= 1e-5
    torch.testing.assert_close(kept[0], before, rtol=1e-4, atol=1e-5)
    # One block of four does in torch what its hooks look at; its keys and feed-forward are normalised on their own.
    assert kernels == {"normalize": 5, "add_normalized": 4, "add_then_normalize": 3, "rotate_normalized": 3, "gate": 4}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card has its own products: tests/gpu/test_rounding.py")
@pytest.mark.parametrize(("kind", "dtype"), [("int8", "float16"), ("float8", "bfloat16")])
def test_rows_are_rounded_where_they_are_made(
    turbo_folder: Path, device: torch.device, kernels: Counter[str], monkeypatch: pytest.MonkeyPatch,
    kind: str, dtype: str,
) -> None:  # fmt: skip
    """With products of the device's own, which the CPU has too, in place of widened ones."""
    with pytest.warns(ZImageWarning, match="round activations"):
        transformer = ZImagePipeline.from_pretrained(
            turbo_folder, dtype=dtype, device=device, weight_dtype=kind, quantize_activations=True
        ).transformer
    calls = Counter[str]()

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = kernel(*args)
            calls[name] += result is not None
            return result

        return call

    for name in ("quantize", "scale_product"):
        monkeypatch.setattr(rounding, name, counted(name, getattr(rounding, name)))
    monkeypatch.setattr("zimage.models.rowwise.has_product", lambda *_: True)
    with using("off"):
        expected = forward(transformer, device)
    assert not calls
    with using("on"):
        result = forward(transformer, device)
    assert distance(result, expected) <= 0.03  # a last bit of half precision can be a step of 8 bits
    # One block of four rounds: what attention gives is rounded on its own, all else by the kernel that makes it.
    rows = calls.pop("quantize")
    assert rows == 1
    assert calls == ({} if (kind, dtype) == ("float8", "bfloat16") else {"scale_product": 7})
    assert kernels == dict.fromkeys(NAMES, 4)
