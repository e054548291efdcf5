"""Decodes and encodes a picture in horizontal strips, so that no tensor of the finest levels exists as a whole.

Strips overlap by what the convolutions reach, and norms use the statistics of the whole picture, gathered in passes of
their own: one for each norm, which computes everything before it again. So the result is that of a whole decode up to
rounding, in a fraction of its memory and several times its time; so is that of an encode. Knows diffusers' decoder and
encoder as `autoencoder` does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..memory.sizes import STRIP, STRIP_CHANNELS, overlap
from .pictures import add, convolve, convolved, upsample

Walk = Generator[tuple[nn.GroupNorm, Tensor], "Statistics", Tensor]
"""Gives each norm and what it is to normalise, is sent that one's statistics, and returns what comes of it. Whoever
walks keeps no tensor that was given: it would be one more that is alive in the next convolution."""


@dataclass(frozen=True)
class Strip:
    """Rows of the source: `begin` to `end` are computed, `first` to `last` of them are kept."""

    begin: int
    end: int
    first: int
    last: int

    def kept(self, tensor: Tensor) -> Tensor:
        """The rows of `tensor`, computed from this strip in any resolution, that are kept."""
        scale = tensor.shape[2] // (self.end - self.begin)
        return tensor[:, :, (self.first - self.begin) * scale : (self.last - self.begin) * scale]


@dataclass(frozen=True)
class Statistics:
    """Of each group of a norm's channels: how many values, their mean, and their variance times that number."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, norm: nn.GroupNorm, values: Tensor) -> Statistics:
        """Of `values` (1, C, h, w)."""
        parts = [
            torch.var_mean(chunk.float().unflatten(1, (groups, -1)), dim=(0, 2, 3, 4), correction=0)
            for groups, chunk in _chunks(norm, values)
        ]
        variance, mean = (torch.cat(part) for part in zip(*parts, strict=True))
        count = values.numel() // norm.num_groups
        return cls(count, mean, variance * count)

    def merged(self, other: Statistics) -> Statistics:
        """Of the values of both (Chan, Golub and LeVeque 1979, eq. 2.1)."""
        count, apart = self.count + other.count, other.mean - self.mean
        share = other.count / count
        return Statistics(
            count, self.mean + share * apart, self.squares + other.squares + self.count * share * apart.square()
        )

    def normalize(self, norm: nn.GroupNorm, values: Tensor) -> Tensor:
        """What `norm` gives for `values` (1, C, h, w) of a picture with these statistics."""
        per_group = norm.num_channels // norm.num_groups
        inverse = (self.squares / self.count + norm.eps).rsqrt()
        scale = norm.weight.float() * inverse.repeat_interleave(per_group)
        shift = norm.bias.float() - self.mean.repeat_interleave(per_group) * scale
        scale, shift = scale[None, :, None, None], shift[None, :, None, None]
        result, begin = torch.empty_like(values), 0
        for _, chunk in _chunks(norm, values):
            end = begin + chunk.shape[1]
            result[:, begin:end] = torch.addcmul(shift[:, begin:end], chunk.float(), scale[:, begin:end])
            begin = end
        return result


def decode_in_strips(decoder: Any, source: Tensor, levels: int, rows: int = STRIP) -> Tensor:
    """Pixels (1, 3, H, W) from `source`, what enters the upsampler before the last `levels` blocks of `decoder`."""
    scale = 2**levels
    strips = list(
        strips_of(source.shape[2], max(1, rows // scale), overlap(len(decoder.up_blocks[-1].resnets), levels))
    )
    walk = partial(_walk, decoder, source, levels=levels)
    known = _statistics(walk, strips, norms(decoder, levels))
    height, width = source.shape[2] * scale, source.shape[3] * scale
    pixels = source.new_empty(1, decoder.conv_out.out_channels, height, width)
    for strip in strips:
        pixels[:, :, strip.first * scale : strip.last * scale] = strip.kept(_finish(walk(strip), known))
    return pixels


def encode_in_strips(encoder: Any, pixels: Tensor, levels: int, rows: int = STRIP) -> Tensor:
    """What the first `levels` blocks of `encoder` make of pixels (1, 3, H, W), down to H / 2**levels rows."""
    scale, blocks = 2**levels, encoder.down_blocks[:levels]
    height, width = pixels.shape[2] // scale, pixels.shape[3] // scale
    strips = list(strips_of(height, max(1, rows // scale), overlap(len(blocks[0].resnets), levels)))
    walk = partial(_walk_down, encoder, pixels, levels=levels)
    known = _statistics(walk, strips, sum(2 * len(block.resnets) for block in blocks))
    shape = 1, blocks[-1].resnets[-1].out_channels, height, width
    hidden = torch.empty(shape, dtype=pixels.dtype, device=pixels.device, memory_format=torch.channels_last)
    for strip in strips:
        hidden[:, :, strip.first : strip.last] = strip.kept(_finish(walk(strip), known))
    return hidden


def norms(decoder: Any, levels: int) -> int:
    """How many norms there are in the last `levels` blocks and after them."""
    return sum(2 * len(block.resnets) for block in decoder.up_blocks[-levels:]) + 1


def strips_of(height: int, step: int, reach: int) -> Iterator[Strip]:
    """Strips of `step` rows that together keep `height` rows, each with `reach` rows around it where there are any."""
    for first in range(0, height, step):
        last = min(height, first + step)
        yield Strip(max(0, first - reach), min(height, last + reach), first, last)


def _statistics(walk: Callable[[Strip], Walk], strips: Sequence[Strip], count: int) -> list[Statistics]:
    """Of each of `count` norms in the order in which a walk asks for them, over all strips."""
    known: list[Statistics] = []
    for _ in range(count):
        known.append(reduce(Statistics.merged, (_gather(walk(strip), known, strip) for strip in strips)))
    return known


def _walk(decoder: Any, source: Tensor, strip: Strip, levels: int) -> Walk:
    """The decoder from the source's rows of a strip on."""
    blocks = decoder.up_blocks
    hidden = _upsampled(blocks[-levels - 1], source[:, :, strip.begin : strip.end])
    for block in blocks[-levels:]:
        for residual in block.resnets:
            hidden = yield from _residual(residual, hidden)
        hidden = _upsampled(block, hidden)
    hidden = yield from _normalized(decoder.conv_norm_out, hidden)
    return decoder.conv_out(F.silu(hidden, inplace=True))


def _walk_down(encoder: Any, pixels: Tensor, strip: Strip, levels: int) -> Walk:
    """The encoder from the pixels of a strip, whose rows are those that leave its first `levels` blocks."""
    scale = 2**levels
    hidden = encoder.conv_in(pixels[:, :, strip.begin * scale : strip.end * scale])
    for block in encoder.down_blocks[:levels]:
        for residual in block.resnets:
            hidden = yield from _residual(residual, hidden)
        for downsampler in block.downsamplers:
            hidden = downsampler(hidden)
    return hidden


def _residual(residual: Any, hidden: Tensor) -> Walk:
    update = yield from _normalized(residual.norm1, hidden)
    update = convolve(residual.conv1, F.silu(update, inplace=True))
    update = yield from _normalized(residual.norm2, update)
    update, bias = convolved(residual.conv2, F.silu(update, inplace=True))
    if residual.conv_shortcut is None:
        return add(update, bias, hidden)
    return add(update, bias, *convolved(residual.conv_shortcut, hidden))


def _normalized(norm: nn.GroupNorm, values: Tensor) -> Walk:
    statistics = yield norm, values
    return statistics.normalize(norm, values)


def _chunks(norm: nn.GroupNorm, values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Some groups of the channels of `values` at a time, and how many."""
    per_group = norm.num_channels // norm.num_groups
    groups = max(1, STRIP_CHANNELS // per_group)
    for first in range(0, norm.num_groups, groups):
        last = min(norm.num_groups, first + groups)
        yield last - first, values[:, first * per_group : last * per_group]


def _upsampled(block: Any, hidden: Tensor) -> Tensor:
    for upsampler in block.upsamplers or ():
        hidden = upsample(upsampler, hidden)
    return hidden


def _gather(walk: Walk, known: list[Statistics], strip: Strip) -> Statistics:
    """The statistics, over the kept rows, of the first norm whose statistics are not known."""
    norm, values = _reach(walk, known)
    walk.close()
    return Statistics.of(norm, strip.kept(values))


def _finish(walk: Walk, known: list[Statistics]) -> Tensor:
    _reach(walk, known[:-1])
    try:
        walk.send(known[-1])
    except StopIteration as end:
        return end.value
    raise AssertionError("there are more norms than statistics")


def _reach(walk: Walk, known: list[Statistics]) -> tuple[nn.GroupNorm, Tensor]:
    """The norm after those whose statistics are known, and what it is to normalise."""
    asked = next(walk)
    for statistics in known:
        del asked
        asked = walk.send(statistics)
    return asked
