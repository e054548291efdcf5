"""Kernels that round rows to 8 bits, and that scale products of such: the plain expressions' numbers and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zimage.kernels import fused, rounding
from zimage.kernels.switch import using
from zimage.models.precision import Float32Math
from zimage.models.quantized import QuantizedLinear, quantize_rows
from zimage.models.rowwise import NARROW, Quantized, rounded, scaled

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["int8", "float8"]
EPS = 1e-5


def plain(hidden: Tensor, kind: str) -> Quantized:
    with using("off"):
        rows = rounded(hidden, kind)
    assert isinstance(rows, Quantized)
    return rows


def agrees(result: Any, reference: Quantized) -> None:
    """To the bit: one row's largest value and a division that rounds to the nearest leave nothing open."""
    values, scale, dtype = result
    assert (values.dtype, values.shape, dtype) == (reference.values.dtype, reference.values.shape, reference.dtype)
    assert torch.equal(scale, reference.scale)
    assert torch.equal(values.view(torch.uint8), reference.values.view(torch.uint8))


def follows(result: Any, reference: Quantized) -> None:
    """The same of rows that a norm made before, whose sums a card adds up in another order in another kernel."""
    if not result[0].is_cuda:
        return agrees(result, reference)
    values, scale, dtype = result
    assert (values.dtype, values.shape, dtype) == (reference.values.dtype, reference.values.shape, reference.dtype)
    # A sum that differs in its last bit, and three roundings of what is multiplied with its root.
    torch.testing.assert_close(scale, reference.scale, rtol=4 * torch.finfo(dtype).eps, atol=0)
    steps = (values.float() - reference.values.float()).abs()
    assert (steps == 0).float().mean() > 0.9
    assert bool((steps <= (1 if values.dtype == torch.int8 else reference.values.float().abs() / 8 + 2**-9)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 64), (1, 2, 3840), (7, 170)], ids=str)
def test_rows_are_rounded(noise: Callable[..., Tensor], dtype: torch.dtype, kind: str, shape: tuple[int, ...]) -> None:
    hidden = 3 * noise(*shape, dtype=dtype)
    hidden.view(-1, shape[-1])[0] = 0
    agrees(rounding.quantize(hidden, NARROW[kind]), plain(hidden, kind))


@pytest.mark.no_cover  # lines are counted in the others and in `test_fused`; here that takes more time than the test
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 35, 48), (1, 2, 3840), (2, 3, 64)], ids=str)
def test_norms_and_gates_round_what_they_make(
    noise: Callable[..., Tensor], dtype: torch.dtype, kind: str, shape: tuple[int, ...]
) -> None:
    """The numbers of the kernel that rounds rows, of the same kernel's result as it is."""
    narrow, stream = NARROW[kind], torch.float32 if dtype == torch.float16 else dtype
    tokens, update = noise(*shape, dtype=stream), noise(*shape, dtype=stream)
    weight, following = noise(shape[-1], dtype=dtype), noise(shape[-1], dtype=dtype)
    for count in {0, 1, shape[0]}:
        gate, factor = (noise(count, 1, shape[-1], dtype=dtype) if count else None for _ in range(2))
        normal = fused.normalize(tokens, weight, factor, EPS)
        assert isinstance(normal, Tensor)
        follows(fused.normalize(tokens, weight, factor, EPS, narrow), plain(normal, kind))
        arguments = tokens, update, weight, gate, EPS, following, factor, 2 * EPS
        added, expected = fused.add_then_normalize(*arguments), fused.add_then_normalize(*arguments, narrow)
        assert added is not None
        assert expected is not None
        nearest = torch.finfo(dtype).eps if tokens.is_cuda else 0.0
        torch.testing.assert_close(added[0], expected[0], rtol=nearest, atol=8 * nearest)
        again = fused.normalize(expected[0], following, factor, 2 * EPS)
        assert isinstance(again, Tensor)
        follows(expected[1], plain(again, kind))
    opening, content = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype)
    given = opening.clone()
    scale = 2.0**-8 if dtype == torch.float16 else 1.0
    gated = fused.gate(opening, content, scale, False)
    assert isinstance(gated, Tensor)
    agrees(fused.gate(opening, content, scale, True, narrow), plain(gated, kind))
    assert torch.equal(opening, given)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN in int8, of the interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_row_alone(noise: Callable[..., Tensor], kind: str, value: float) -> None:
    hidden = noise(5, 64)
    hidden[3, 17] = value
    with using("on"):
        rows = rounded(hidden, kind)
    assert isinstance(rows, Quantized)
    finite = rows.scale.isfinite().flatten().tolist()
    assert finite == [True, True, True, False, True]
    assert not (rows.values[3].float() * rows.scale[3]).isfinite().any()
    for column in (17, 47):  # a gated row of 48 numbers is 32 and 16
        opening, content = noise(2, 48), noise(2, 48)
        content[1, column] = value
        gated: Any = fused.gate(opening, content, 1.0, False, NARROW[kind])
        assert gated[1].isfinite().flatten().tolist() == [True, False]


@pytest.mark.parametrize("source", [torch.int32, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 48), (9, 1100), (1, 1)], ids=str)
def test_a_product_is_scaled(
    noise: Callable[..., Tensor], dtype: torch.dtype, source: torch.dtype, shape: tuple[int, int]
) -> None:
    product = (1e7 * noise(*shape)).to(source)
    row_scale, column_scale = noise(shape[0], 1).abs() * 1e-3, noise(shape[1], 1).abs() * 1e-3
    for bias in (None, noise(shape[1], dtype=dtype)):
        with using("off"):
            expected = scaled(product, row_scale, column_scale, bias, dtype)
        result = rounding.scale_product(product, row_scale, column_scale, bias, dtype)
        assert result is not None
        assert result.dtype == dtype
        assert torch.equal(result, expected)
        exact = product.double() * row_scale * column_scale.t() + (0 if bias is None else bias)
        # Two products and a sum in float32, then the type's own rounding.
        torch.testing.assert_close(result.double(), exact, rtol=torch.finfo(dtype).eps + 1e-6, atol=1e-4)


def test_what_no_kernel_was_written_for(noise: Callable[..., Tensor]) -> None:
    hidden, weight, narrow = noise(2, 4, 8), noise(8), torch.int8
    for other in (hidden.double(), hidden.transpose(0, 1), hidden[:0], noise(1, 16385)):
        assert rounding.quantize(other, narrow) is None
        assert fused.normalize(other, noise(other.shape[-1]), None, EPS, narrow) is None
        assert fused.gate(other, other, 1.0, False, narrow) is None
    assert fused.add_then_normalize(hidden, hidden[:1], weight, None, EPS, weight, None, EPS, narrow) is None
    product, rows, columns = noise(4, 8).int(), noise(4, 1), noise(8, 1)
    for arguments in (
        (product.long(), rows, columns, None, torch.float32),
        (product, rows, columns, None, torch.float64),
        (product, rows.t(), columns, None, torch.float32),
        (product, rows, columns[:7], None, torch.float32),
        (product.t(), columns, rows, None, torch.float32),
        (product[:0], rows[:0], columns, None, torch.float32),
    ):
        assert rounding.scale_product(*arguments) is None


def test_a_card_that_cannot_convert_to_float8_is_left_alone(
    noise: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnCard(Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    card = noise(2, 8).as_subclass(OnCard)
    assert not fused._converts(card, torch.float8_e4m3fn)
    assert fused._converts(card, torch.int8)
    assert fused._converts(card, None)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_math_says_that_rows_were_float32(noise: Callable[..., Tensor], kind: str) -> None:
    """So that the product is float32 as well, whatever type the weights of the norm have."""
    hidden, weight = noise(2, 8, dtype=torch.float16), noise(8, dtype=torch.float16)
    product, scale = (100 * noise(2, 8)).int(), noise(2, 1)
    with Float32Math():
        results = (
            fused.normalize(hidden, weight, None, EPS, NARROW[kind]),
            fused.add_then_normalize(hidden, hidden, weight, None, EPS, weight, None, EPS, NARROW[kind])[1],  # type: ignore[index]
            fused.gate(hidden, hidden, 1.0, False, NARROW[kind]),
            rounding.quantize(hidden, NARROW[kind]),
        )
        assert [result[2] for result in results] == [torch.float32] * 4  # type: ignore[index]
        made = rounding.scale_product(product, scale, noise(8, 1), weight, torch.float32)
    assert made is not None
    assert made.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (13, 530), (40, 512)], ids=str)
def test_weights_are_widened(
    noise: Callable[..., Tensor], dtype: torch.dtype, kind: str, shape: tuple[int, int]
) -> None:
    """To the bit: the scale is rounded to the type first, as torch's product of the two has it."""
    weight, scale = quantize_rows(noise(*shape), kind)
    scale = scale * 1.01  # no number of 16 bits
    expected = weight.to(dtype).mul_(scale.to(dtype))
    widened = rounding.widen(weight, scale, dtype)
    assert widened is not None
    assert widened.dtype == dtype
    assert torch.equal(widened, expected)


def test_weights_that_are_not_widened_here(noise: Callable[..., Tensor]) -> None:
    weight, scale = quantize_rows(noise(8, 32), "int8")
    for other in ((weight[:, ::2], scale), (weight[:4], scale), (weight, scale.half()), (weight.float(), scale),
                  (weight[:0], scale[:0]), (weight[0], scale)):  # fmt: skip
        assert rounding.widen(*other, torch.float32) is None
    assert rounding.widen(weight, scale, torch.float64) is None


def test_a_layer_widens_its_weights_with_it(noise: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    widen = rounding.widen
    monkeypatch.setattr(rounding, "widen", lambda *given: (made.append("widen"), widen(*given))[1])
    layer = QuantizedLinear(nn.Linear(32, 8, bias=False), "int8")
    stored = quantize_rows(noise(8, 32), "int8")
    layer.weight, layer.scale = (nn.Parameter(one, requires_grad=False) for one in stored)
    hidden = noise(2, 3, 32)
    with using("off"):
        expected = layer(hidden)
    assert made == []
    with using("on"):
        assert torch.equal(layer(hidden), expected)
    assert made == ["widen"]
