"""The kernels themselves, in Triton. Each is the plain expression of `models/layers.py` with its order of roundings.

What is read is widened to float32, computed there and rounded where torch rounds; sums are over one row, in one
program, so that a row's bits depend on nothing else. Offsets of rows have 64 bits. Token counts and strides are not
compiled in: another size of picture needs no new kernel. Importing this needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normal(wide, weight, eps, width: tl.constexpr):
    """RMS norm of rows (rows, columns) in float32 whose columns beyond `width` are zero, in the weight's type."""
    inverse = tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)
    normal = (wide * inverse[:, None]).to(weight.dtype).to(tl.float32)
    return (normal * weight.to(tl.float32)[None, :]).to(weight.dtype)


@triton.jit
def _times(values, factors):
    return (values.to(tl.float32) * factors.to(tl.float32)[None, :]).to(values.dtype)


@triton.jit
def _store(values, result, scales, place, row, inside, is_row):
    """Rows (rows, columns) of `values` to `place` in `result`; with `scales`, `result` is int8 or float8 e4m3, and each
    row is rounded to that with a scale of its own, which goes to `row` there. See `models/rowwise.py`."""
    if scales is None:
        tl.store(result + place, values, mask=inside)
    else:
        most, broken = _reach(values)
        scale = _scale(most, broken, result.dtype.element_ty)
        tl.store(result + place, _narrow(values, scale, result.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale, mask=is_row)


@triton.jit
def _reach(values):
    """The largest magnitude in each of the rows (rows, columns), which passes NaN over, and a sum in which it and
    infinities stay, 0 else."""
    wide = values.to(tl.float32)
    return tl.max(tl.abs(wide), 1), tl.sum(wide * 0.0, 1)


@triton.jit
def _scale(most, broken, narrow: tl.constexpr):
    """The scale of rows that reach so far in `narrow`, at least 2⁻¹⁰⁰."""
    inverse: tl.constexpr = 1.0 / 127.0 if narrow == tl.int8 else 1.0 / 448.0
    return tl.maximum(most * inverse, 7.888609052210118e-31) + broken


@triton.jit
def _narrow(values, scale, narrow: tl.constexpr):
    """Rows (rows, columns) in `narrow`, each divided by its scale."""
    scaled = values.to(tl.float32) * tl.div_rn(1.0, scale)[:, None]
    if narrow == tl.int8:
        scaled = (scaled + 12582912.0) - 12582912.0  # 1.5 · 2²³, beside which only whole numbers are: to the nearest
    return scaled.to(narrow)


@triton.jit(do_not_specialize=["tokens"])
def normalize_rows(
    hidden,
    weight,
    factor,
    result,
    scales,
    tokens,
    eps,
    batched: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """RMS norm of `rows` tokens, times `factor` (batch or 1, width) if there is one, stored as `_store` has it; grid
    (tokens / rows, batch)."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.arange(0, columns)
    inside = (token < tokens)[:, None] & (column < width)[None, :]
    place = (batch * tokens + token)[:, None] * width + column[None, :]
    wide = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    normal = _normal(wide, tl.load(weight + column, mask=column < width, other=0.0), eps, width)
    if factor is not None:
        start = batch * width if batched else 0
        normal = _times(normal, tl.load(factor + start + column, mask=column < width, other=0.0))
    _store(normal, result, scales, place, batch * tokens + token, inside, token < tokens)


@triton.jit(do_not_specialize=["tokens"])
def add_rows(
    stream,
    update,
    weight,
    gate,
    result,
    next_weight,
    next_factor,
    next_result,
    next_scales,
    tokens,
    eps,
    next_eps,
    batched: tl.constexpr,
    next_batched: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Rows of the residual stream plus the norm of `update`, times `gate` if there is one, as `normalize_rows` has it;
    plus `update` as it is where there is no `weight`.

    With a `next_weight`, the norm of what that gives as well, before it leaves the registers, as `_store` has it.
    """
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.arange(0, columns)
    inside = (token < tokens)[:, None] & (column < width)[None, :]
    place = (batch * tokens + token)[:, None] * width + column[None, :]
    wide = tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(stream + place, mask=inside, other=0.0).to(tl.float32)
    if weight is None:
        total = (before + wide).to(result.dtype.element_ty)
    else:
        normal = _normal(wide, tl.load(weight + column, mask=column < width, other=0.0), eps, width)
        if gate is not None:
            start = batch * width if batched else 0
            normal = _times(normal, tl.load(gate + start + column, mask=column < width, other=0.0))
        total = (before + normal.to(tl.float32)).to(result.dtype.element_ty)
    tl.store(result + place, total, mask=inside)
    if next_weight is not None:
        following = tl.load(next_weight + column, mask=column < width, other=0.0)
        normal = _normal(total.to(tl.float32), following, next_eps, width)
        if next_factor is not None:
            start = batch * width if next_batched else 0
            normal = _times(normal, tl.load(next_factor + start + column, mask=column < width, other=0.0))
        _store(normal, next_result, next_scales, place, batch * tokens + token, inside, token < tokens)


@triton.jit(do_not_specialize=["length"])
def gate_elements(
    gate,
    content,
    result,
    length,
    scale: tl.constexpr,
    is_whole: tl.constexpr,
    block: tl.constexpr,
):
    """`silu(gate) * (content * scale)`, `block` elements a program; without masks if that divides the `length`.

    `result` may be `gate`."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = None if is_whole else place < length
    tl.store(result + place, _gated(gate, content, place, inside, scale), mask=inside)


@triton.jit
def gate_rows(
    gate, content, result, scales, scale: tl.constexpr, width: tl.constexpr, head: tl.constexpr, tail: tl.constexpr
):
    """The same for one row of `width` numbers a program, rounded as `_store` has it; grid (tokens,).

    A row is taken as its first `head` numbers and the `tail` after them, both powers of two: 10240 have no power of two
    near above them. There may be no tail."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    narrow: tl.constexpr = result.dtype.element_ty
    place = row[:, None] * width + tl.arange(0, head)[None, :]
    first = _gated(gate, content, place, None, scale)
    most, broken = _reach(first)
    if tail > 0:
        column = head + tl.arange(0, tail)[None, :]
        after, inside = row[:, None] * width + column, column < width
        rest = tl.where(inside, _gated(gate, content, after, inside, scale), 0.0)
        most_after, broken_after = _reach(rest)
        most, broken = tl.maximum(most, most_after), broken + broken_after
    factor = _scale(most, broken, narrow)
    tl.store(result + place, _narrow(first, factor, narrow))
    if tail > 0:
        tl.store(result + after, _narrow(rest, factor, narrow), mask=inside)
    tl.store(scales + row, factor)


@triton.jit
def _gated(gate, content, place, inside, scale: tl.constexpr):
    dtype: tl.constexpr = gate.dtype.element_ty
    opening = tl.load(gate + place, mask=inside).to(tl.float32)
    opening = (opening / (1.0 + tl.exp(-opening))).to(dtype).to(tl.float32)
    held = tl.load(content + place, mask=inside).to(tl.float32)
    if scale != 1.0:
        held = (held * scale).to(dtype).to(tl.float32)
    return (opening * held).to(dtype)


@triton.jit(do_not_specialize=["tokens"])
def quantize_rows(hidden, result, scales, tokens, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """`rows` tokens as they are, rounded as `_store` has it; grid (tokens / rows,)."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, columns)[None, :]
    place, inside = row[:, None] * width + column, (row < tokens)[:, None] & (column < width)
    _store(tl.load(hidden + place, mask=inside, other=0.0), result, scales, place, row, inside, row < tokens)


@triton.jit(do_not_specialize=["tokens"])
def scale_rows(
    product,
    row_scales,
    column_scales,
    bias,
    result,
    tokens,
    width: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """A tile of a product (tokens, width) of 8-bit numbers times the scales of its rows and columns, plus `bias`
    (width,) if there is one; grid (tokens / rows, width / columns)."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    is_row, is_column = row < tokens, column < width
    place, inside = row[:, None] * width + column[None, :], is_row[:, None] & is_column[None, :]
    wide = tl.load(product + place, mask=inside, other=0).to(tl.float32)
    wide = wide * tl.load(row_scales + row, mask=is_row, other=0.0)[:, None]
    wide = wide * tl.load(column_scales + column, mask=is_column, other=0.0)[None, :]
    if bias is not None:
        wide += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tl.store(result + place, wide.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["outputs"])
def widen_rows(weight, scales, result, outputs, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """A tile of weights (outputs, width) in 8 bits times the scales of their rows, which are rounded to the type of
    `result` before; grid (outputs / rows, width / columns)."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    is_row, is_column = row < outputs, column < width
    place, inside = row[:, None] * width + column[None, :], is_row[:, None] & is_column[None, :]
    dtype: tl.constexpr = result.dtype.element_ty
    scale = tl.load(scales + row, mask=is_row, other=0.0).to(dtype).to(tl.float32)
    wide = tl.load(weight + place, mask=inside).to(tl.float32) * scale[:, None]
    tl.store(result + place, wide.to(dtype), mask=inside)
