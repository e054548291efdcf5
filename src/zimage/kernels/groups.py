"""Group norm with SiLU for pictures whose channels lie side by side (channels last), in Triton.

On CUDA torch's own brings such a picture into another layout. Here one pass gathers each group's mean and variance,
tile by tile, and the program that is the last to end joins them into a scale and a shift for each channel; another pass
applies those. Both add the bias of the convolution before, if it has not been added. Which program sees which pixels,
and the order in which they are joined, follow from the size alone, so bits repeat. Importing this needs Triton.

Numbers of one picture, in float32: scales and shifts of its channels; how many programs have ended, which is zero at
the start, and room up to two times the groups; of each program the groups' means, and their squares.
"""

from __future__ import annotations

import triton
import triton.language as tl

JOINED = tl.constexpr(64)
"""Programs whose numbers are joined at a time: more would take registers that the pass over the picture needs."""


@triton.jit(do_not_specialize=["pixels", "tiles", "share"])
def gather_groups(
    hidden,
    added,
    weight,
    bias,
    numbers,
    pixels,
    tiles,
    share,
    eps,
    groups: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
):
    """What each channel of `hidden` is multiplied with, and what is added; grid (pixels / share, batch), each program
    with `tiles` tiles of `rows` pixels, `share` in all."""
    part, parts = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    batch = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, groups * size)
    group = tl.arange(0, groups)
    count = tl.zeros((rows, 1), tl.float32)
    mean = tl.zeros((rows, groups), tl.float32)
    square = tl.zeros((rows, groups), tl.float32)
    for tile in range(tiles):
        pixel = part * share + tile * rows + tl.arange(0, rows)
        wide = tl.reshape(_loaded(hidden, added, batch, pixel, pixels, channel, groups * size), (rows, groups, size))
        middle = tl.sum(wide, 2) / size
        apart = wide - middle[:, :, None]
        known = tl.where(pixel < pixels, size, 0).to(tl.float32)[:, None]
        count, mean, square = _merged(count, mean, square, known, middle, tl.sum(apart * apart, 2))
    count, mean, square = _joined(count, mean, square)
    numbers = _row(numbers, batch, parts, groups, size)
    ended = numbers + 2 * groups * size
    first = ended + 2 * groups
    tl.store(first + part * 2 * groups + group, mean)
    tl.store(first + part * 2 * groups + groups + group, square)
    tl.debug_barrier()  # what all threads stored is there before the one that counts says so
    if tl.atomic_add(ended, 1.0, sem="acq_rel") == parts - 1:
        _join(first, weight, bias, numbers, pixels, parts, share, eps, groups, size)


@triton.jit
def _join(first, weight, bias, numbers, pixels, parts, share, eps, groups: tl.constexpr, size: tl.constexpr):
    """From the numbers of `parts` programs of `share` pixels each, the last one fewer, those of the channels."""
    group = tl.arange(0, groups)
    count = tl.zeros((1,), tl.float32)
    mean = tl.zeros((groups,), tl.float32)
    square = tl.zeros((groups,), tl.float32)
    for begin in range(0, parts, JOINED):
        part = begin + tl.arange(0, JOINED)
        inside = (part < parts)[:, None] & (group < groups)[None, :]
        place = part[:, None] * 2 * groups + group[None, :]
        means = tl.load(first + place, mask=inside, other=0.0)
        squares = tl.load(first + place + groups, mask=inside, other=0.0)
        known = tl.maximum(tl.minimum(pixels - part * share, share), 0).to(tl.float32)[:, None] * size
        known, means, squares = _joined(known, means, squares)
        count, mean, square = _merged(count, mean, square, known, means, squares)
    inverse = tl.rsqrt(square / count + eps)
    channel = group[:, None] * size + tl.arange(0, size)[None, :]
    scale = tl.load(weight + channel).to(tl.float32) * inverse[:, None]
    shift = tl.load(bias + channel).to(tl.float32) - mean[:, None] * scale
    tl.store(numbers + channel, scale)
    tl.store(numbers + groups * size + channel, shift)


@triton.jit(do_not_specialize=["pixels", "parts"])
def activate_groups(
    hidden,
    added,
    numbers,
    result,
    pixels,
    parts,
    groups: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
):
    """`silu(hidden * scale + shift)` by channel, rounded before and after silu; grid (pixels / rows, batch)."""
    batch = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    channels: tl.constexpr = groups * size
    channel = tl.arange(0, channels)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    place = (batch * pixels + pixel)[:, None] * channels + channel[None, :]
    numbers = _row(numbers, batch, parts, groups, size)
    scale = tl.load(numbers + channel)
    shift = tl.load(numbers + channels + channel)
    dtype: tl.constexpr = result.dtype.element_ty
    wide = _loaded(hidden, added, batch, pixel, pixels, channel, channels)
    normal = tl.where(inside, wide * scale[None, :] + shift[None, :], 0.0).to(dtype).to(tl.float32)
    tl.store(result + place, (normal / (1.0 + tl.exp(-normal))).to(dtype), mask=inside)


@triton.jit
def _loaded(hidden, added, batch, pixel, pixels, channel, channels: tl.constexpr):
    """Pixels of `hidden`, plus what is `added` to each channel, rounded as torch rounds that sum; 0 outside."""
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    place = (batch * pixels + pixel)[:, None] * channels + channel[None, :]
    wide = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        wide += tl.load(added + channel).to(tl.float32)[None, :]
        wide = tl.where(inside, wide, 0.0).to(hidden.dtype.element_ty).to(tl.float32)
    return wide


@triton.jit
def _row(numbers, batch, parts, groups: tl.constexpr, size: tl.constexpr):
    """The numbers of one picture; `fused.activate_groups` makes room for them."""
    return numbers + batch * (2 * groups * (size + 1 + parts))


@triton.jit
def _merged(count, mean, square, known, middle, spread):
    """Number, mean, and summed squares of what differs from it, of two sets of values: Chan, Golub and LeVeque (1979),
    eq. 2.1."""
    total = count + known
    share = known / tl.maximum(total, 1.0)
    step = middle - mean
    return total, mean + step * share, square + spread + step * step * (count * share)


@triton.jit
def _joined(count, mean, square):
    """The same of all rows of `mean` and `square` (rows, groups), of `count` (rows, 1) values each."""
    total = tl.sum(count, 0)
    middle = tl.sum(mean * count, 0) / tl.maximum(total, 1.0)
    apart = mean - middle[None, :]
    return total, middle, tl.sum(square + apart * apart * count, 0)
