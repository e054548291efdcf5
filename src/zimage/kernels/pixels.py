"""Sums and enlargements of pictures whose channels lie side by side (channels last), in Triton.

Each number is read once and written once, or four times where the picture grows, sixteen bytes at a time. Nothing is
summed over pixels; group norms are in `groups`. Importing this needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length"])
def add_elements(
    update,
    bias,
    hidden,
    hidden_bias,
    length,
    channels: tl.constexpr,
    is_whole: tl.constexpr,
    block: tl.constexpr,
):
    """`(update + bias) + (hidden + hidden_bias)` over `update`, rounded after each sum, `block` elements a program;
    without masks if that divides the `length`."""
    start = tl.program_id(0).to(tl.int64) * block
    place = start + tl.arange(0, block)
    channel = ((start % channels).to(tl.int32) + tl.arange(0, block)) % channels
    if channels % 16 == 0:  # so that biases are read as wide as pictures, which not every Triton sees by itself
        channel = tl.max_contiguous(tl.multiple_of(channel, 16), 16)
    inside = None if is_whole else place < length
    wide = _biased(update, bias, place, channel, inside)
    if hidden is not None:
        wide += _biased(hidden, hidden_bias, place, channel, inside)
    tl.store(update + place, wide.to(update.dtype.element_ty), mask=inside)


@triton.jit
def _biased(hidden, bias, place, channel, inside):
    wide = tl.load(hidden + place, mask=inside).to(tl.float32)
    if bias is not None:
        wide = (wide + tl.load(bias + channel).to(tl.float32)).to(hidden.dtype.element_ty).to(tl.float32)
    return wide


@triton.jit(do_not_specialize=["pixels", "width"])
def double_pixels(hidden, result, pixels, width, channels: tl.constexpr, columns: tl.constexpr, rows: tl.constexpr):
    """Each of `pixels` pixels, in lines of `width`, four times; grid (pixels / rows,)."""
    pixel = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.arange(0, columns)[None, :]
    inside = (pixel < pixels)[:, None] & (channel < channels)
    values = tl.load(hidden + pixel.to(tl.int64)[:, None] * channels + channel, mask=inside)
    first = (pixel // width) * (4 * width) + (pixel % width) * 2
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            place = (first + (down * 2 * width + right)).to(tl.int64)[:, None] * channels + channel
            tl.store(result + place, values, mask=inside)
