"""Attention in float8 on a Hopper card: its numbers at real widths, and pictures with it, recorded and not.

tests/kernels/test_attention.py has what it computes, there in Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from zimage import ZImagePipeline
from zimage.kernels import attention, fused
from zimage.testing import build_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.skipif(torch.cuda.get_device_capability() != attention.CARD, reason="written for Hopper's cards"),
]
HEADS, SIZE = 30, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("gpu") / "turbo", size="small", dtype="bfloat16")


def noise(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(sum(shape)), device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens"), [(1, 4096 + 128), (2, 1024 + 64), (1, 256 + 32), (3, 77), (1, 16384 + 96)]
)
def test_it_is_attention_at_real_widths(batch: int, tokens: int, dtype: torch.dtype) -> None:
    given = [noise(batch, tokens, HEADS, SIZE, dtype=dtype) for _ in range(2)]
    given[1] = given[1].flip(1).contiguous()
    weights = [1 + noise(SIZE, dtype=dtype) / 4 for _ in range(2)]
    angles = noise(1, tokens, SIZE // 2, dtype=torch.float32)
    rest = *weights, torch.polar(torch.ones_like(angles), angles), 1e-5, 1e-5
    value = noise(batch, HEADS, tokens, SIZE, dtype=dtype).transpose(1, 2).contiguous()
    plain, narrow = (
        fused.rotate_normalized(*given, *rest),
        fused.rotate_normalized(*given, *rest, False, torch.float8_e4m3fn),
    )
    assert plain is not None
    assert narrow is not None
    (query, query_scale, _), (key, key_scale, _) = narrow
    results = [attention.attend(query, query_scale, key, key_scale, value) for _ in range(3)]
    assert results[0] is not None
    assert all(one is not None and torch.equal(one, results[0]) for one in results)
    wide = [(one.double() * scale).transpose(1, 2) for one, scale in ((query, query_scale), (key, key_scale))]
    wide.append(value.double().transpose(1, 2))
    heads = [F.scaled_dot_product_attention(*(one[:, [head]] for one in wide)) for head in range(HEADS)]
    exact = torch.cat(heads, dim=1).transpose(1, 2)
    assert (results[0] - exact).norm() <= 0.045 * exact.norm()
    assert abs((results[0] - exact).mean()) <= 1e-3 * exact.std()
    unrounded = F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (*plain, value))).transpose(1, 2)
    assert torch.cosine_similarity(results[0].flatten().float(), unrounded.flatten().float(), dim=0) >= 0.998


def drawn(pipe: ZImagePipeline, side: int) -> Tensor:
    options: dict[str, Any] = {"seed": 3, "num_inference_steps": 4, "any_size": True, "progress": False}
    images = pipe("a red fox", height=side, width=side, output_type="latent", **options).images
    return images[0]  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pictures_are_near_and_repeat(folder: Path, dtype: str, launches: list[str]) -> None:
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype=dtype)
    exact = drawn(pipe, 256)
    pipe.set_attention_backend("float8")
    launches.clear()
    first = drawn(pipe, 256)
    assert launches.count("attend_heads") >= 4 * len(pipe.transformer.layers)
    assert torch.equal(drawn(pipe, 256), first)
    cosine = torch.cosine_similarity(first.flatten().float(), exact.flatten().float(), dim=0).item()
    assert 0.99 <= cosine < 1
    pipe.compile(cuda_graphs=True)
    for side in (256, 128, 256):
        recorded = drawn(pipe, side)
    assert torch.equal(recorded, first)
    assert pipe.attention_backend == "float8"
