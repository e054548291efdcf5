"""Group norm with SiLU for pictures whose channels lie side by side (channels last), in Triton.

On CUDA torch's own brings such a picture into another layout. Here one pass gathers each group's mean and variance,
tile by tile, a small one joins them into a scale and a shift for each channel, and one applies those. Which program
sees which pixels follows from the size alone, so bits repeat. Importing this needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pixels", "tiles"])
def gather_groups(
    hidden,
    means,
    squares,
    pixels,
    tiles,
    groups: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
):
    """Of `tiles` tiles of `rows` pixels: each group's mean, and the squares of what differs from it, summed; grid
    (pixels / rows / tiles, batch). Tiles are joined as in Chan, Golub and LeVeque (1979), eq. 2.1."""
    channels: tl.constexpr = groups * size
    part, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, channels)
    count = 0.0
    mean = tl.zeros((groups,), tl.float32)
    square = tl.zeros((groups,), tl.float32)
    for tile in range(tiles):
        first = (part * tiles + tile) * rows
        pixel = first + tl.arange(0, rows)
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        place = (batch * pixels + pixel)[:, None] * channels + channel[None, :]
        wide = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
        wide = tl.reshape(wide, (rows, groups, size))
        known = tl.maximum(tl.minimum(pixels - first, rows), 0).to(tl.float32) * size
        middle = tl.sum(tl.sum(wide, 2), 0) / tl.maximum(known, 1.0)
        apart = tl.where((pixel < pixels)[:, None, None], wide - middle[None, :, None], 0.0)
        spread = tl.sum(tl.sum(apart * apart, 2), 0)
        total = count + known
        step = middle - mean
        mean += step * (known / total)
        square += spread + step * step * (count * known / total)
        count = total
    place = (batch * tl.num_programs(0) + part) * groups + tl.arange(0, groups)
    tl.store(means + place, mean)
    tl.store(squares + place, square)


@triton.jit(do_not_specialize=["pixels", "parts", "share"])
def join_groups(
    means,
    squares,
    weight,
    bias,
    scales,
    shifts,
    pixels,
    parts,
    share,
    eps,
    groups: tl.constexpr,
    size: tl.constexpr,
    most: tl.constexpr,
):
    """From `parts` of `share` pixels each, the last one fewer: what each channel is multiplied with, and what is added;
    grid (batch,)."""
    batch = tl.program_id(0).to(tl.int64)
    part, group = tl.arange(0, most), tl.arange(0, groups)
    place = (batch * parts + part)[:, None] * groups + group[None, :]
    inside = (part < parts)[:, None] & (group < groups)[None, :]
    mean = tl.load(means + place, mask=inside, other=0.0)
    square = tl.load(squares + place, mask=inside, other=0.0)
    known = tl.maximum(tl.minimum(pixels - part * share, share), 0).to(tl.float32)[:, None] * size
    count = pixels.to(tl.float32) * size
    middle = tl.sum(mean * known, 0) / count
    apart = mean - middle[None, :]
    variance = (tl.sum(square, 0) + tl.sum(tl.where(inside, apart * apart * known, 0.0), 0)) / count
    inverse = tl.rsqrt(variance + eps)
    channel = group[:, None] * size + tl.arange(0, size)[None, :]
    scale = tl.load(weight + channel).to(tl.float32) * inverse[:, None]
    shift = tl.load(bias + channel).to(tl.float32) - middle[:, None] * scale
    place = batch * groups * size + channel
    tl.store(scales + place, scale)
    tl.store(shifts + place, shift)


@triton.jit(do_not_specialize=["pixels"])
def activate_groups(hidden, scales, shifts, result, pixels, channels: tl.constexpr, rows: tl.constexpr):
    """`silu(hidden * scale + shift)` by channel, rounded before and after silu; grid (pixels / rows, batch)."""
    batch = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    channel = tl.arange(0, channels)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    place = (batch * pixels + pixel)[:, None] * channels + channel[None, :]
    scale = tl.load(scales + batch * channels + channel)
    shift = tl.load(shifts + batch * channels + channel)
    dtype: tl.constexpr = result.dtype.element_ty
    wide = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    normal = tl.where(inside, wide * scale[None, :] + shift[None, :], 0.0).to(dtype).to(tl.float32)
    tl.store(result + place, (normal / (1.0 + tl.exp(-normal))).to(dtype), mask=inside)
