"""The kernels of attention's heads, in Triton: queries and keys are normalised and turned, values rounded, and softmax
attention of what is so in float8.

Written with the rules of `rows`, but for the attention, whose sums over keys run from block to block. Importing this
needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import _normal


@triton.jit
def _turn(
    given,
    result,
    scale,
    weight,
    cosine,
    sine,
    dense,
    inside,
    eps,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    halves: tl.constexpr,
    reach: tl.constexpr,
):
    """The heads `given` (rows, columns), normalised and turned, to `dense` in `result`; with a `scale`, the
    same for all, in float8: no channel of a turned head passes √size times the largest weight, as no pair of a
    normalised one does. `reach` is √size / 448."""
    channel = tl.arange(0, columns)
    weights = tl.load(weight + channel, mask=channel < size, other=0.0)
    normal = _normal(given.to(tl.float32), weights, eps, size).to(tl.float32)
    if halves:
        pairs = tl.permute(tl.reshape(normal, (rows, 2, columns // 2)), (0, 2, 1))
    else:
        pairs = tl.reshape(normal, (rows, columns // 2, 2))
    even, odd = tl.split(pairs)
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    if halves:
        turned = tl.permute(turned, (0, 2, 1))
    turned = tl.reshape(turned, (rows, columns))
    if scale is not None:
        one = tl.maximum(tl.max(tl.abs(weights.to(tl.float32))) * reach, 7.888609052210118e-31)
        turned = turned * tl.div_rn(1.0, one)
        tl.store(scale, one, mask=(tl.program_id(0) == 0) & (tl.program_id(1) == 0))
    tl.store(result + dense, turned.to(result.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "query_batch",
        "query_token",
        "query_head",
        "key_batch",
        "key_token",
        "key_head",
        "turn_batch",
        "turn_token",
    ]
)
def rotate_heads(
    query,
    key,
    query_weight,
    key_weight,
    rotations,
    query_result,
    key_result,
    query_scale,
    key_scale,
    tokens,
    query_batch,
    query_token,
    query_head,
    key_batch,
    key_token,
    key_head,
    turn_batch,
    turn_token,
    query_eps,
    key_eps,
    step: tl.constexpr,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    size: tl.constexpr,
    count: tl.constexpr,
    places: tl.constexpr,
    columns: tl.constexpr,
    halves: tl.constexpr,
    reach: tl.constexpr,
):
    """Queries and keys of `count` tokens, in `places` for heads each: RMS norm of each head, then its pairs of channels
    turned, which are neighbours or, with `halves`, one of each half; grid (tokens / count, batch). Strides are in units
    of `step` elements: what is known to be a multiple of 16 can be read many channels at once.
    """
    first, batch = tl.program_id(0).to(tl.int64) * count, tl.program_id(1).to(tl.int64)
    row = tl.arange(0, count * places)
    token, head = first + row // places, (row % places).to(tl.int64)
    channel = tl.arange(0, columns)
    inside = ((token < tokens) & (head < heads))[:, None] & (channel < size)[None, :]
    dense = (((batch * tokens + token) * heads + head) * size)[:, None] + channel[None, :]
    inside_key = ((token < tokens) & (head < key_heads))[:, None] & (channel < size)[None, :]
    dense_key = (((batch * tokens + token) * key_heads + head) * size)[:, None] + channel[None, :]
    place = ((batch * query_batch + token * query_token + head * query_head) * step)[:, None] + channel[None, :]
    queries = tl.load(query + place, mask=inside, other=0.0)
    place = ((batch * key_batch + token * key_token + head * key_head) * step)[:, None] + channel[None, :]
    keys = tl.load(key + place, mask=inside_key, other=0.0)
    turned = first + tl.arange(0, count)
    turns = (batch * turn_batch + turned * turn_token)[:, None] + channel[None, :]
    turns = tl.load(rotations + turns, mask=(turned < tokens)[:, None] & (channel < size)[None, :], other=0.0)
    cosine, sine = tl.split(tl.reshape(turns, (count, columns // 2, 2)))
    if count > 1:
        shape: tl.constexpr = (count, places, columns // 2)
        cosine = tl.reshape(tl.broadcast_to(cosine[:, None, :], shape), (count * places, columns // 2))
        sine = tl.reshape(tl.broadcast_to(sine[:, None, :], shape), (count * places, columns // 2))
    _turn(
        queries, query_result, query_scale, query_weight, cosine, sine, dense, inside, query_eps,
        size, count * places, columns, halves, reach,
    )  # fmt: skip
    _turn(
        keys, key_result, key_scale, key_weight, cosine, sine, dense_key, inside_key, key_eps,
        size, count * places, columns, halves, reach,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "groups"])
def narrow_values(
    values, result, scales, tokens, groups, width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
):
    """Values (B, tokens, width) as float8 (B, width, 16 · groups), every channel with a scale of its own in `scales`
    (B, width); grid (width / columns, batch).

    Tokens lie in the order of `_paired`, zeros after the last: so a thread of `attend_heads` has the weights of those
    that it multiplies.
    """
    batch, channel = tl.program_id(1).to(tl.int64), tl.program_id(0) * columns + tl.arange(0, columns)
    is_channel, start = (channel < width)[None, :], batch * tokens * width
    reach = tl.zeros((rows, columns), tl.int32)  # magnitudes as integers, of which NaN is the largest
    for first in range(0, tokens, rows):
        token = first + tl.arange(0, rows)
        place = start + token.to(tl.int64)[:, None] * width + channel[None, :]
        wide = tl.load(values + place, mask=(token < tokens)[:, None] & is_channel, other=0.0).to(tl.float32)
        reach = tl.maximum(reach, wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    most = tl.max(reach, 0).to(tl.float32, bitcast=True) * (1.0 / 448.0)
    scale = tl.where(most < 7.888609052210118e-31, 7.888609052210118e-31, most)
    tl.store(scales + batch * width + channel, scale, mask=channel < width)
    inverse = tl.div_rn(1.0, scale)
    for first in range(0, groups * 16, rows):
        place = first + tl.arange(0, rows)
        token = place // 16 * 16 + place % 4 // 2 * 8 + place % 16 // 4 * 2 + place % 2
        source = start + token.to(tl.int64)[:, None] * width + channel[None, :]
        wide = tl.load(values + source, mask=(token < tokens)[:, None] & is_channel, other=0.0).to(tl.float32)
        narrow = (wide * inverse[None, :]).to(result.dtype.element_ty)
        target = (batch * width + channel.to(tl.int64))[None, :] * (groups * 16) + place[:, None]
        tl.store(result + target, narrow, mask=(place < groups * 16)[:, None] & is_channel)


@triton.jit
def _paired(weights, rows: tl.constexpr, columns: tl.constexpr):
    """Columns of `weights` (rows, columns) in another order, 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15 of each 16.

    A thread has two columns of each 8 of a product and multiplies four of each 16 of an 8-bit factor: in this order
    those are the same, and none is handed from thread to thread (FlashAttention-3 does so too, arXiv 2407.08608).
    """
    apart = tl.permute(tl.reshape(weights, (rows, columns // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(apart, (rows, columns))


@triton.jit
def _mix(scores, values, top, total, mixed, factor, rows: tl.constexpr, columns: tl.constexpr):
    """One block of keys more: its `scores` (rows, columns) and `values` (columns, size), added to the largest score,
    the sum of weights and the sum of values of each row so far.

    Weights are powers of two of what is at most 8, which uses most of float8's range. A block's sum of products is
    added up in float32: the tensor cores' own sums of 8-bit numbers have fewer bits, and lose some with each key.
    """
    new = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(tl.fma(scores, factor, tl.fma(new, -factor, 8.0)[:, None]))
    kept = tl.exp2((top - new) * factor)
    total = tl.fma(total, kept, tl.sum(weights, 1))
    block = tl.dot(_paired(weights.to(values.dtype), rows, columns), values)
    return new, total, tl.fma(mixed, kept[:, None], block)


@triton.jit(do_not_specialize=["tokens"])
def attend_heads(
    query,
    key,
    value,
    query_scale,
    key_scale,
    value_scales,
    result,
    tokens,
    factor,
    heads: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Softmax attention of queries and keys (B, tokens, heads, size) in float8, with one scale each, and values as
    `narrow_values` makes them, to `result` (B, tokens, heads, size); grid (tokens / rows, heads, batch).

    `key` describes blocks (columns, size) of (B · tokens, heads · size), `value` those (size, columns) of
    (B · heads · size, 16 · groups). `factor` is what products are multiplied with before a power of two is taken of
    them, log2(e) / √size.
    """
    first, head, batch = tl.program_id(0) * rows, tl.program_id(1), tl.program_id(2)
    width: tl.constexpr = heads * size
    row, column, channel = first + tl.arange(0, rows), tl.arange(0, columns), tl.arange(0, size)
    place = batch.to(tl.int64) * tokens * width + head * size + row[:, None] * width + channel[None, :]
    queries = tl.load(query + place, mask=(row < tokens)[:, None], other=0.0)
    factor = factor * tl.load(query_scale) * tl.load(key_scale)
    # At least 2⁻⁸⁰, with which all keys weigh the same but what is no key, whose score of -1e30 still weighs nothing.
    factor = tl.where(factor < 8.271806125530277e-25, 8.271806125530277e-25, factor)
    start, channels = batch * tokens, (batch * heads + head) * size
    top, total = tl.full((rows,), -1e30, tl.float32), tl.zeros((rows,), tl.float32)
    mixed = tl.zeros((rows, size), tl.float32)
    whole = tokens // columns * columns
    for at in tl.range(0, whole, columns, num_stages=2):
        scores = tl.dot(queries, key.load([start + at, head * size]).T)
        values = value.load([channels, at]).T
        top, total, mixed = _mix(scores, values, top, total, mixed, factor, rows, columns)
    if whole < tokens:
        scores = tl.dot(queries, key.load([start + whole, head * size]).T)
        scores = tl.where((whole + column < tokens)[None, :], scores, -1e30)
        values = value.load([channels, whole]).T
        top, total, mixed = _mix(scores, values, top, total, mixed, factor, rows, columns)
    scales = tl.load(value_scales + channels + channel)
    mixed = mixed * scales[None, :] * tl.div_rn(1.0, total)[:, None]
    tl.store(result + place, mixed.to(result.dtype.element_ty), mask=(row < tokens)[:, None])
