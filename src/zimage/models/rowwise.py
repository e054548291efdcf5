"""Activations in 8 bits, each token's row with a scale of its own, and their products with weights that are stored so.

A product is the device's own of 8-bit numbers where it has one for the shape. Elsewhere both sides are widened: the
same numbers are multiplied, so the result means the same, but that is more work than weights alone in 8 bits. Knows no
layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..kernels.switch import run, wanted
from ..memory.ladder import is_out_of_memory

NARROW = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
"""What numbers of each kind are stored as."""
MOST = {"int8": 127.0, "float8": 448.0}
"""The largest values of int8 (symmetric) and of float8 e4m3 (arXiv 2209.05433, table 1)."""
LEAST_SCALE = 2.0**-100
"""Of a row of zeros, whose scale would have no inverse."""
MULTIPLE, LEAST_ROWS = {"int8": 8, "float8": 16}, 17
"""What rows and columns of a weight must be multiples of, and how many tokens there must be, for torch's products on
CUDA (`torch._int_mm`, `torch._scaled_mm`)."""
FAST_SUMS = False
"""Whether float8 products may be summed up in the tensor cores' own accumulators alone (`use_fast_accum`), else float32
takes over now and then. On an H200 those cut off: 3840 products of factors with a mean of half their deviation came out
0.7 % too small, of one sign 7 %, 10240 of one sign 17 %; a product took a tenth less time, a picture none."""
AGREEMENT = 1e-2
"""How far, relative to its norm, a device's product may be from the widened one to be taken for right."""


@dataclass(frozen=True)
class Quantized:
    """Rows of activations: `values` (..., width) in int8 or float8, times `scale` (..., 1) in float32.

    `dtype` is the type that they had, and that a product with them has.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    def widened(self) -> Tensor:
        """The rows (..., width) in their type."""
        return (self.values.float() * self.scale).to(self.dtype)


Rows = Tensor | Quantized
"""What a linear layer of blocks takes: tokens as they are, or rounded already because several layers share them."""


def rounded(hidden: Tensor, kind: str | None) -> Rows:
    """`hidden` (..., width) in `kind`, "int8" or "float8"; as it is without one, and where gradients are wanted, which
    rounding has none of."""
    if kind is None or (torch.is_grad_enabled() and hidden.requires_grad):
        return hidden
    if wanted(hidden):
        fused = run("rounding.quantize", hidden, NARROW[kind])
        if fused is not None:
            return Quantized(*fused)
    wide = hidden.float()
    # An infinity or NaN makes its row's scale so, and with it all that is multiplied with the row.
    most = torch.linalg.vector_norm(wide, torch.inf, dim=-1, keepdim=True)
    scale = (most * (1.0 / MOST[kind])).clamp(min=LEAST_SCALE)  # on CUDA torch divides by a number in this way
    scaled = wide * (1.0 / scale)
    return Quantized((scaled.round_() if kind == "int8" else scaled).to(NARROW[kind]), scale, hidden.dtype)


def multiplied(rows: Quantized, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`rows` (..., in) times the weight (out, in) of their kind with its `scale` (out, 1): (..., out) in their type."""
    kind = next(kind for kind, narrow in NARROW.items() if narrow == weight.dtype)
    if rows.scale.numel() >= LEAST_ROWS and has_product(kind, rows.dtype, weight.shape, weight.device):
        return _product(rows, weight, scale, bias)
    return F.linear(rows.widened(), weight.to(rows.dtype).mul_(scale.to(rows.dtype)), bias)


def has_product(kind: str, dtype: torch.dtype, shape: torch.Size, device: torch.device) -> bool:
    """Whether `device` multiplies such numbers, by a weight of `shape` (out, in), into `dtype` faster than wider ones.

    On CPUs `torch._int_mm` computes number by number: 30 times as slow as in float32, where it was measured.
    """
    fits = all(side % MULTIPLE[kind] == 0 for side in shape)
    return fits and device.type == "cuda" and _works(kind, dtype, device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _works(kind: str, dtype: torch.dtype, device: torch.device) -> bool:
    return _tried(kind, dtype, device)


@cache
def _tried(kind: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device's product is there and right: tried once, because which cards and versions of torch have it is
    a long list that changes."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        hidden, wide = torch.randn(2, 32, 64, generator=generator).to(device)
        rows, weight = rounded(hidden, kind), rounded(wide, kind)
        assert isinstance(rows, Quantized)
        assert isinstance(weight, Quantized)
        exact = rows.widened() @ weight.widened().t()
        try:
            made = _product(Quantized(rows.values, rows.scale, dtype), weight.values, weight.scale, None)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            return False
        return bool((made.float() - exact).norm() <= AGREEMENT * exact.norm())


def _product(rows: Quantized, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The device's product of 8-bit numbers."""
    values = rows.values.flatten(0, -2)
    if weight.dtype == torch.int8:
        product = torch._int_mm(values, weight.t())  # (tokens, out) in int32
    elif rows.dtype == torch.bfloat16:
        scales = rows.scale.flatten(0, -2), scale.t()  # (tokens, 1), (1, out)
        result = torch._scaled_mm(
            values, weight.t(), *scales, bias=bias, out_dtype=rows.dtype, use_fast_accum=FAST_SUMS
        )
        return result.view(*rows.values.shape[:-1], -1)
    else:  # row by row only into bfloat16, whatever the version of torch
        one = torch.ones((), device=values.device)
        product = torch._scaled_mm(values, weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=FAST_SUMS)
    return scaled(product, rows.scale.flatten(0, -2), scale, bias, rows.dtype).view(*rows.values.shape[:-1], -1)


def scaled(product: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A product (tokens, out) of 8-bit numbers, in int32 or float32, times the scales (tokens, 1) and (out, 1), plus
    `bias` (out,), in `dtype`."""
    if wanted(product):
        fused: Tensor | None = run("rounding.scale_product", product, row_scale, column_scale, bias, dtype)
        if fused is not None:
            return fused
    wide = product.float() * row_scale * column_scale.t()
    return (wide if bias is None else wide + bias.float()).to(dtype)
