"""What GGUF files store weights as: blocks of 32 or 256 numbers in 2 to 8 bits with scales of their own, and their way
back to numbers.

The layouts are those of ggml (https://github.com/ggml-org/ggml, `ggml-common.h`); values come out as they are defined
there, in float32. Works on a device of any kind, in plain operations. Knows no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..memory.sizes import GGML_BLOCKS

PIECE = 2**22
"""Numbers that are widened at a time."""

_IQ4_LEVELS = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
"""The sixteen values of the non-linear kinds."""


@dataclass(frozen=True)
class Kind:
    """Where in a block float16 scales are, and what makes numbers (n, numbers) in float32 of blocks (n, bytes)."""

    halves: tuple[int, ...]
    widen: Callable[[Tensor], Tensor]


def table(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`numbers` on a device, brought there once: for what comes from the host it would wait each time, and a CUDA graph
    cannot be recorded of that. A compiler keeps them by itself."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=dtype, device=device)
    return _kept(numbers, dtype, device)


@cache
def _kept(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)


def packed_bytes(kind: str, numbers: int) -> int:
    """Bytes of a row of so many numbers."""
    in_block, count = GGML_BLOCKS[kind]
    return numbers // in_block * count


def widen(packed: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Rows (n, bytes) in uint8 as numbers (n, columns) in `dtype`."""
    in_block, count = GGML_BLOCKS[kind]
    columns = packed.shape[1] // count * in_block
    rows = packed.new_empty((len(packed), columns), dtype=dtype)
    step = max(1, PIECE // max(1, columns))
    for first in range(0, len(packed), step):
        part = packed[first : first + step]
        rows[first : first + step] = KINDS[kind].widen(part.reshape(-1, count)).view(len(part), columns)
    return rows


def pack_q8_0(rows: Tensor) -> Tensor:
    """Rows (n, columns) in float32 as rows (n, bytes) of Q8_0, rounded as ggml does: halves away from zero."""
    numbers, count = GGML_BLOCKS["Q8_0"]
    blocks = rows.reshape(-1, numbers)
    packed = blocks.new_empty((len(blocks), count), dtype=torch.uint8)
    for part, stored in zip(blocks.split(PIECE // numbers), packed.split(PIECE // numbers), strict=True):
        scales = part.abs().amax(dim=1, keepdim=True) / 127.0
        scaled = part * torch.where(scales > 0, 1.0 / scales, 0.0)
        size = scaled.abs()
        whole = size.floor()
        whole.add_(size.sub_(whole).mul_(2.0).floor_()).copysign_(scaled)
        stored[:, :2] = scales.to(torch.float16).view(torch.uint8)
        stored[:, 2:] = whole.to(torch.int8).view(torch.uint8)
    return packed.view(len(rows), -1)


def are_finite(packed: Tensor, kind: str) -> bool:
    """Whether all scales in rows (n, bytes) are, and so all numbers."""
    blocks = packed.reshape(-1, GGML_BLOCKS[kind][1])
    return all(bool(torch.isfinite(_half(blocks, place)).all()) for place in KINDS[kind].halves)


def _half(blocks: Tensor, place: int) -> Tensor:
    """The float16 at a place of each block, (n, 1) in float32."""
    return blocks[:, place : place + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(n, ..., m) bytes as (n, ..., 2m): the lower halves of all, then the upper ones."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _bits(packed: Tensor, width: int, count: int) -> Tensor:
    """(n, ..., m) bytes as (n, ..., count, m): of each the lowest `width` bits, then the next, ..."""
    shifts = torch.arange(0, width * count, width, device=packed.device, dtype=torch.uint8)
    return (packed[..., None, :] >> shifts[:, None]) & ((1 << width) - 1)


def _fifth_bits(blocks: Tensor, place: int) -> Tensor:
    """Bit k of the four bytes from `place` on as (n, 32), worth 16 each."""
    return _bits(blocks[:, place : place + 4], 1, 8).transpose(1, 2).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8.0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (numbers.float() - 16.0)


def _q5_1(blocks: Tensor) -> Tensor:
    numbers = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * numbers.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _levels(_nibbles(blocks[:, 2:]))


def _iq4_xs(blocks: Tensor) -> Tensor:
    upper = _bits(blocks[:, 2:4], 2, 4).transpose(1, 2).flatten(1)  # (n, 8)
    lower = _bits(blocks[:, 4:8], 4, 2).transpose(1, 2).flatten(1)
    scales = _half(blocks, 0) * ((lower | upper << 4).float() - 32.0)
    return _scaled(_levels(_nibbles(blocks[:, 8:].unflatten(1, (8, 16)))), scales)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, numbers = blocks[:, :16], _bits(blocks[:, 16:80].unflatten(1, (2, 32)), 2, 4)  # (n, 2, 4, 32)
    numbers = numbers.flatten(1).unflatten(1, (16, 16)).float()
    least = _half(blocks, 82) * (scales >> 4).float()
    return _scaled(numbers, _half(blocks, 80) * (scales & 15).float(), least)


def _q3_k(blocks: Tensor) -> Tensor:
    numbers = _bits(blocks[:, 32:96].unflatten(1, (2, 32)), 2, 4).flatten(1)
    above = _bits(blocks[:, :32], 1, 8).flatten(1)  # (n, 256)
    numbers = (numbers | above << 2).float() - 4.0
    lower = _nibbles(blocks[:, 96:104])
    upper = _bits(blocks[:, 104:108], 2, 4).flatten(1)
    scales = _half(blocks, 108) * ((lower | upper << 4).float() - 32.0)
    return _scaled(numbers.unflatten(1, (16, 16)), scales)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, least = _sixes(blocks)
    return _scaled(_nibbles(blocks[:, 16:].unflatten(1, (4, 32))).reshape(-1, 8, 32).float(), scales, least)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, least = _sixes(blocks)
    above = _bits(blocks[:, 16:48], 1, 8)  # (n, 8, 32)
    numbers = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).reshape(-1, 8, 32)
    return _scaled((numbers | above << 4).float(), scales, least)


def _q6_k(blocks: Tensor) -> Tensor:
    lower = _nibbles(blocks[:, :128].unflatten(1, (2, 64)))  # (n, 2, 128)
    upper = _bits(blocks[:, 128:192].unflatten(1, (2, 32)), 2, 4).flatten(2)
    numbers = (lower | upper << 4).float() - 32.0
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return _scaled(numbers.flatten(1).unflatten(1, (16, 16)), scales)


def _sixes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and the eight least values of blocks that begin with two halves and 12 bytes of them."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    least = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * least.float()


def _levels(numbers: Tensor) -> Tensor:
    return table(_IQ4_LEVELS, torch.float32, numbers.device)[numbers.int()]


def _scaled(numbers: Tensor, scales: Tensor, least: Tensor | None = None) -> Tensor:
    """(n, groups, m) times a scale of each group, less its least value, as (n, groups · m)."""
    products = numbers * scales[..., None]
    return (products if least is None else products - least[..., None]).flatten(1)


KINDS = {
    "Q4_0": Kind((0,), _q4_0),
    "Q4_1": Kind((0, 2), _q4_1),
    "Q5_0": Kind((0,), _q5_0),
    "Q5_1": Kind((0, 2), _q5_1),
    "Q8_0": Kind((0,), _q8_0),
    "Q2_K": Kind((80, 82), _q2_k),
    "Q3_K": Kind((108,), _q3_k),
    "Q4_K": Kind((0, 2), _q4_k),
    "Q5_K": Kind((0, 2), _q5_k),
    "Q6_K": Kind((208,), _q6_k),
    "IQ4_NL": Kind((0,), _iq4_nl),
    "IQ4_XS": Kind((0,), _iq4_xs),
}
"""By ggml's names."""
