"""Products of 8-bit activations on CUDA: the device's own, kernels before and after them, pictures and streaming.

tests/models/test_rowwise.py and test_activations.py have the same on a CPU, where only tests take torch's own products.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zimage import ZImagePipeline
from zimage.kernels.switch import using
from zimage.models import rowwise
from zimage.models.quantized import QuantizedLinear, quantize_rows
from zimage.models.rowwise import Quantized, has_product, multiplied, rounded
from zimage.testing import build_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_grad")]
TOKENS, DIM, HIDDEN = 4096 + 128, 3840, 10240
CARDS = {"int8": (7, 5), "float8": (8, 9)}
"""Compute capability from which on a card has such products."""
SHAPES = [(DIM, DIM), (HIDDEN, DIM), (DIM, HIDDEN)]
PICTURE: dict[str, Any] = {"height": 512, "width": 512, "num_inference_steps": 3, "seed": 4, "progress": False}


@pytest.fixture(params=["int8", "float8"])
def kind(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if torch.cuda.get_device_capability() < CARDS[name]:
        pytest.skip(f"this card has no products of {name}")
    return name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("gpu") / "small", size="small", dtype="bfloat16")


def noise(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda").to(dtype)


def rows_of(hidden: Tensor, kind: str) -> Quantized:
    rows = rounded(hidden, kind)
    assert isinstance(rows, Quantized)
    return rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_card_multiplies_the_rounded_numbers(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    hidden, bias = noise(1, TOKENS, shape[1], dtype=dtype), noise(shape[0], dtype=dtype)
    weight, scale = quantize_rows(noise(*shape, dtype=torch.float32) / shape[1] ** 0.5, kind)
    assert has_product(kind, dtype, weight.shape, weight.device)
    rows = rows_of(hidden, kind)
    for given in (None, bias):
        product, again = (multiplied(rows, weight, scale, given) for _ in range(2))
        assert (product.shape, product.dtype) == ((1, TOKENS, shape[0]), dtype)
        assert torch.equal(product, again)
        exact = (rows.values.double() * rows.scale)[0] @ (weight.double() * scale).t()
        exact = exact if given is None else exact + given
        # float8 sums are those of the tensor cores' accumulators.
        most = max(torch.finfo(dtype).eps, 1e-5 if kind == "int8" else 2e-3)
        assert (product[0].double() - exact).norm() <= most * exact.norm()


@pytest.mark.parametrize("tokens", [1, 16, 17, 100])
def test_any_number_of_tokens(kind: str, tokens: int) -> None:
    weight, scale = quantize_rows(noise(DIM, DIM, dtype=torch.float32), kind)
    rows = rows_of(noise(tokens, DIM, dtype=torch.bfloat16), kind)
    exact = (rows.values.double() * rows.scale) @ (weight.double() * scale).t()
    assert (multiplied(rows, weight, scale, None).double() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pictures_are_near_the_plain_ones(folder: Path, launches: list[str], kind: str, dtype: str) -> None:
    """No layer is widened, which a warning would say; kernels round what they make."""
    full, weights, both = (
        ZImagePipeline.from_pretrained(folder, device="cuda", dtype=dtype, **options)
        for options in ({}, {"weight_dtype": kind}, {"weight_dtype": kind, "quantize_activations": True})
    )
    exact, wide = (pipe("a fox", output_type="latent", **PICTURE).images for pipe in (full, weights))
    both("a fox", output_type="latent", **PICTURE)  # the first one tries whether the card has such products
    launches.clear()
    made = both("a fox", output_type="latent", **PICTURE).images
    blocks = len(both.transformer.layers) - 1
    wanted = blocks * PICTURE["num_inference_steps"]
    assert launches.count("quantize_rows") == launches.count("gate_rows") == wanted
    assert isinstance(made, Tensor)
    assert torch.equal(made, both("a fox", output_type="latent", **PICTURE).images)
    with using("off"):
        plain = both("a fox", output_type="latent", **PICTURE).images
    for other, most in ((exact, {"int8": 0.1, "float8": 0.2}[kind]), (wide, 0.2), (plain, 0.05)):
        assert (made.float() - other.float()).norm() <= most * other.float().norm()


def test_they_pass_through_the_card_with_the_same_bits(folder: Path, kind: str) -> None:
    asked: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
    pipe = ZImagePipeline.from_pretrained(folder, weight_dtype=kind, quantize_activations=True, **asked)
    made = pipe("a fox", output_type="latent", **PICTURE).images
    assert pipe.plan is not None
    placement = replace(
        pipe.plan.placement, text_encoder="streamed", resident_blocks=4, context_resident=False, slots=2
    )
    streamed = ZImagePipeline.from_pretrained(folder, memory=replace(pipe.plan, placement=placement), **asked)
    assert streamed.activations == kind
    assert torch.equal(streamed("a fox", output_type="latent", **PICTURE).images, made)


def test_compiled_blocks_give_the_same_picture(folder: Path, kind: str) -> None:
    pipe = ZImagePipeline.from_pretrained(
        folder, device="cuda", dtype="bfloat16", weight_dtype=kind, quantize_activations=True
    )
    made = pipe("a fox", output_type="latent", **PICTURE).images
    with using("off"):
        again = pipe.compile()("a fox", output_type="latent", **PICTURE).images
        assert pipe.compiled
    assert (again.float() - made.float()).norm() <= 0.1 * made.float().norm()


def test_products_never_wait_for_the_card(kind: str) -> None:
    weight, scale = quantize_rows(noise(HIDDEN, DIM, dtype=torch.float32), kind)
    hidden = noise(1, TOKENS, DIM, dtype=torch.bfloat16)
    multiplied(rows_of(hidden, kind), weight, scale, None)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        multiplied(rows_of(hidden, kind), weight, scale, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_four_bits_are_widened_without_waiting_for_the_card() -> None:
    with torch.device("meta"):
        layer = QuantizedLinear(nn.Linear(DIM, HIDDEN, bias=False), "nf4")
    stored = quantize_rows(noise(HIDDEN, DIM, dtype=torch.float32), "nf4")
    layer.weight, layer.scale = (nn.Parameter(one, requires_grad=False) for one in stored)
    hidden = noise(1, TOKENS, DIM, dtype=torch.bfloat16)
    layer(hidden)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        layer(hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_the_card_cannot_multiply_is_widened(kind: str) -> None:
    weight, scale = quantize_rows(noise(100, 426, dtype=torch.float32), kind)
    assert not has_product(kind, torch.bfloat16, weight.shape, weight.device)
    rows = rows_of(noise(40, 426, dtype=torch.bfloat16), kind)
    exact = (rows.values.double() * rows.scale) @ (weight.double() * scale).t()
    assert (multiplied(rows, weight, scale, None).double() - exact).norm() <= 0.01 * exact.norm()
    assert rowwise.MULTIPLE[kind] > 2
