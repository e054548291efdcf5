"""Kernels around products of 8-bit numbers: rows are rounded before, products scaled after, or weights widened for one.

Launched as those of `fused` are, and with its rules: `None` where a kernel was not written for what is given. Rows that
a norm or a gate makes are rounded by its own kernel. Imported at the first use; importing it needs Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused, rows

SCALED_ROWS, SCALED_COLUMNS = 8, 512
"""The tile of a program that scales a product: the scales of its columns are read once for all its rows."""


@fused._overridable
def quantize(hidden: Tensor, narrow: torch.dtype) -> fused.Rounded | None:
    """Rows of `hidden` (..., width), rounded to `narrow`."""
    shape = fused._shape(hidden)
    if shape is None or not fused._fit(hidden, shape[2]) or not fused._converts(hidden, narrow):
        return None
    result, scales = fused._rows_like(hidden, hidden.dtype, narrow)
    count, columns = fused._tile(shape[2])
    fused._launch(
        rows.quantize_rows, (-(-shape[1] // count),), hidden, result, scales, shape[1],
        width=shape[2], rows=count, columns=columns, num_warps=fused._warps(columns),
    )  # fmt: skip
    assert scales is not None
    return result, scales, hidden.dtype


@fused._overridable
def scale_product(
    product: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """`product` (tokens, width), int32 or float32, times `row_scale` (tokens, 1) and `column_scale` (width, 1), in
    float32, plus `bias` (width,), in `dtype`."""
    tokens, width = product.shape
    given = [one for one in (product, row_scale, column_scale, bias) if one is not None]
    if product.dtype not in (torch.int32, torch.float32) or dtype not in fused.TYPES or not product.numel():
        return None
    if any(one.device != product.device or not one.is_contiguous() for one in given):
        return None
    if row_scale.shape != (tokens, 1) or column_scale.shape != (width, 1) or width > fused.MOST_BATCHES:
        return None
    result = torch.empty(product.shape, dtype=dtype, device=product.device)
    fused._launch(
        rows.scale_rows, (-(-tokens // SCALED_ROWS), -(-width // SCALED_COLUMNS)), product, row_scale, column_scale,
        bias, result, tokens, width=width, rows=SCALED_ROWS, columns=SCALED_COLUMNS, num_warps=8,
    )  # fmt: skip
    return result


@fused._overridable
def widen(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Weights (out, in) in int8 or float8 times their `scale` (out, 1), in `dtype`: a pass over both, where torch has
    two over the wide ones."""
    if weight.ndim != 2 or not weight.numel() or weight.dtype not in (torch.int8, torch.float8_e4m3fn):
        return None
    if dtype not in fused.TYPES or not fused._converts(weight, weight.dtype):
        return None
    outputs, width = weight.shape
    if scale.shape != (outputs, 1) or scale.dtype != torch.float32 or scale.device != weight.device:
        return None
    if not (weight.is_contiguous() and scale.is_contiguous()) or -(-width // SCALED_COLUMNS) > fused.MOST_BATCHES:
        return None
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    fused._launch(
        rows.widen_rows, (-(-outputs // SCALED_ROWS), -(-width // SCALED_COLUMNS)), weight, scale, result, outputs,
        width=width, rows=SCALED_ROWS, columns=SCALED_COLUMNS, num_warps=8,
    )  # fmt: skip
    return result
