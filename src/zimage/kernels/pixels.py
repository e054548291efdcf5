"""Sums of pictures whose channels lie side by side (channels last), and the weights that enlarge them, in Triton.

Each number of a picture is read once and written once, sixteen bytes at a time. Nothing is summed over pixels; group
norms are in `groups`. Importing this needs Triton.
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


@triton.jit
def spread_taps(
    weight,
    result,
    inputs: tl.constexpr,
    outputs: tl.constexpr,
    step: tl.constexpr,
    apart: tl.constexpr,
    block: tl.constexpr,
):
    """Sums of the taps of `weight` (outputs, inputs, 3, 3) to `result` (inputs, 4, 4, outputs); its input channels lie
    `step` numbers apart and its taps `apart`; grid (outputs / block, inputs / block)."""
    first_output, first_input = tl.program_id(0).to(tl.int64) * block, tl.program_id(1).to(tl.int64) * block
    over, down = tl.arange(0, block)[None, :], tl.arange(0, block)[:, None]
    inside = (first_output + over < outputs) & (first_input + down < inputs)
    source = weight + (first_output * (9 * inputs) + first_input * step) + (over * (9 * inputs) + down * step)
    target = result + (first_input * (16 * outputs) + first_output) + (down * (16 * outputs) + over)
    for right in tl.static_range(4):
        top = _summed(source, inside, apart, right)
        middle = _summed(source + 3 * apart, inside, apart, right)
        bottom = _summed(source + 6 * apart, inside, apart, right)
        place = target + right * outputs
        tl.store(place, bottom.to(result.dtype.element_ty), mask=inside)
        tl.store(place + 4 * outputs, (middle + bottom).to(result.dtype.element_ty), mask=inside)
        tl.store(place + 8 * outputs, (top + middle).to(result.dtype.element_ty), mask=inside)
        tl.store(place + 12 * outputs, top.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _summed(row, inside, apart: tl.constexpr, right: tl.constexpr):
    """Of the three taps of a row those that fall on column `right` of four: the last, the last two, the first two, the
    first."""
    first: tl.constexpr = 2 - right if right < 2 else 0
    wide = tl.load(row + first * apart, mask=inside).to(tl.float32)
    if right == 1 or right == 2:
        wide += tl.load(row + (first + 1) * apart, mask=inside).to(tl.float32)
    return wide
