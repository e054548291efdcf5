"""Rows of activations in 8 bits: how far they are from the plain ones, and products with them, on either way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zimage.models import rowwise
from zimage.models.precision import Float32Math
from zimage.models.quantized import quantize_rows
from zimage.models.rowwise import Quantized, has_product, multiplied, rounded

KINDS = ["int8", "float8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(hidden: Tensor, kind: str) -> Quantized:
    rows = rounded(hidden, kind)
    assert isinstance(rows, Quantized)
    return rows


@pytest.fixture(params=[False, True], ids=["widened", "the device's product"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether products are torch's own of 8-bit numbers, which the CPU has too, if slowly."""
    monkeypatch.setattr(rowwise, "has_product", lambda *_: request.param)
    return bool(request.param)


@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 70),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]),
)
def test_the_error_of_each_number_is_bounded(rows: int, width: int, seed: int, size: float) -> None:
    """By half a step of int8, by 2⁻⁴ of itself in float8, or half of its smallest step."""
    hidden = size * noise(2, rows, width, seed=seed)
    most = hidden.abs().amax(-1, keepdim=True)
    for kind, bound in (("int8", most / 254), ("float8", torch.maximum(hidden.abs() / 16, most / 448 * 2**-10))):
        found = rows_of(hidden, kind)
        assert found.values.shape == hidden.shape
        assert found.scale.shape == (2, rows, 1)
        assert found.scale.dtype == torch.float32
        assert ((found.widened() - hidden).abs() <= 1.0001 * bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_depends_on_no_other(kind: str) -> None:
    hidden = noise(4, 64)
    alone = rows_of(hidden[1:2].clone(), kind)
    hidden[0], hidden[2], hidden[3] = 1e6, 0.0, torch.nan
    among = rows_of(hidden, kind)
    assert torch.equal(among.widened()[1:2], alone.widened())
    assert not among.widened()[2].any()
    assert among.scale.isfinite().flatten().tolist() == [True, True, True, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_its_products_so(way: bool, kind: str, value: float) -> None:
    """So that the step is noticed and computed again in float32: int8 has no NaN of its own."""
    hidden, (weight, scale) = noise(20, 64), quantize_rows(noise(32, 64, seed=1), kind)
    hidden[3, 5] = value
    product = multiplied(rows_of(hidden, kind), weight, scale, None)
    assert not product[3].isfinite().any()
    assert product[[0, 19]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_that_of_the_rounded_numbers(way: bool, kind: str, dtype: torch.dtype) -> None:
    hidden, bias = 3 * noise(2, 20, 64).to(dtype), noise(32, seed=2).to(dtype)
    weight, scale = quantize_rows(noise(32, 64, seed=1), kind)
    rows = rows_of(hidden, kind)
    exact = (rows.values.double() * rows.scale) @ (weight.double() * scale).t()
    for given_bias in (None, bias):
        product = multiplied(rows, weight, scale, given_bias)
        assert (product.shape, product.dtype) == ((2, 20, 32), dtype)
        wanted = exact if given_bias is None else exact + bias
        error = (product.double() - wanted).norm() / wanted.norm()
        assert error <= max(2 * torch.finfo(dtype).eps, 1e-6)
    plain = hidden.float() @ (weight.float() * scale).t()
    assert 1e-4 < (exact - plain).norm() / plain.norm() < {"int8": 0.01, "float8": 0.04}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_sums_beyond_float16_are_no_problem_until_they_are_scaled(way: bool, kind: str) -> None:
    hidden, weight = torch.full((20, 1024), 2.0, dtype=torch.float16), torch.full((16, 1024), 1.0)
    product = multiplied(rows_of(hidden, kind), *quantize_rows(weight, kind), None)
    torch.testing.assert_close(product, torch.full((20, 16), 2048.0, dtype=torch.float16), rtol=0.01, atol=0)


def test_where_the_device_multiplies_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    card, cpu, tried = torch.device("cuda:1"), torch.device("cpu"), []

    def works(*asked: Any) -> bool:
        tried.append(asked)
        return asked[1] is not torch.float16

    monkeypatch.setattr(rowwise, "_tried", works)
    for kind, shape, device, dtype, expected in (
        ("int8", (3840, 10240), card, torch.bfloat16, True),
        ("int8", (160, 424), card, torch.bfloat16, True),
        ("float8", (160, 424), card, torch.bfloat16, False),
        ("float8", (160, 432), card, torch.bfloat16, True),
        ("int8", (160, 426), card, torch.bfloat16, False),
        ("int8", (426, 160), card, torch.bfloat16, False),
        ("int8", (3840, 10240), card, torch.float16, False),
        ("int8", (3840, 10240), cpu, torch.bfloat16, False),
    ):
        assert has_product(kind, dtype, torch.Size(shape), device) is expected
    assert set(tried) == {
        (kind, dtype, card) for kind, dtype in (("int8", torch.bfloat16), ("float8", torch.bfloat16),
                                                ("int8", torch.float16))
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_device_is_tried(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    """Right products are taken, wrong ones, none at all and errors are not; memory that runs out decides nothing."""
    trial, product, cpu = rowwise._tried.__wrapped__, rowwise._product, torch.device("cpu")
    assert trial(kind, dtype, cpu)
    monkeypatch.setattr(rowwise, "_product", lambda *given: 1.1 * product(*given))
    assert not trial(kind, dtype, cpu)
    monkeypatch.setattr(rowwise, "_product", lambda *given: torch.nan * product(*given))
    assert not trial(kind, dtype, cpu)

    def fails(error: Exception) -> Any:
        def raising(*_: Any) -> Tensor:
            raise error

        return raising

    monkeypatch.setattr(rowwise, "_product", fails(RuntimeError("only on sm_89")))
    assert not trial(kind, dtype, cpu)
    monkeypatch.setattr(rowwise, "_product", fails(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError):
        trial(kind, dtype, cpu)


def test_few_tokens_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch._int_mm` takes 17 and more on CUDA."""
    asked: list[int] = []
    monkeypatch.setattr(rowwise, "has_product", lambda *_: True)
    monkeypatch.setattr(rowwise, "_product", lambda rows, *_: asked.append(len(rows.values)))
    weight, scale = quantize_rows(noise(16, 16), "int8")
    for count in (1, 16, 17):
        multiplied(rows_of(noise(count, 16), "int8"), weight, scale, None)
    assert asked == [17]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_second_try_in_float32_is_one(way: bool, kind: str, dtype: torch.dtype) -> None:
    """Of a product that float16 cannot hold, rounded in it or on the way."""
    hidden, (weight, scale) = 1000 * noise(20, 64).to(dtype), quantize_rows(1000 * noise(32, 64, seed=1), kind)
    with Float32Math():
        product = multiplied(rows_of(hidden, kind), weight, scale, None)
    assert product.dtype == torch.float32
    exact = hidden.double() @ (weight.double() * scale).t()
    assert exact.abs().max() > 1e6
    assert (product - exact).norm() <= {"int8": 0.01, "float8": 0.04}[kind] * exact.norm()


def test_gradients_pass_by() -> None:
    hidden = noise(3, 8).requires_grad_(True)
    assert rounded(hidden, "int8") is hidden
    assert rounded(hidden, None) is hidden
    with torch.no_grad():
        assert isinstance(rounded(hidden, "int8"), Quantized)
