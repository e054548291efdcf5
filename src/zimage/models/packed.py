"""Weights that stay as a file has them: ggml's kinds, and 8-bit floats of which each row has a scale.

A row of 8-bit floats is its bytes and, in the four after them, its scale in float32: so it moves, streams and is
counted as a row of ggml's does. Knows no layers and no files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory.sizes import FLOAT8
from . import ggml

FLOATS = dict(zip(FLOAT8, (torch.float8_e4m3fn, torch.float8_e5m2), strict=True))
KINDS = (*ggml.KINDS, *FLOATS)
SCALE = 4
"""Bytes of a row's scale."""

_MAGNITUDE = 0x7F
_LARGEST = {"F8_E4M3": 0x7E, "F8_E5M2": 0x7B}
"""The bytes of the largest finite numbers; those above are NaN or infinite."""


def row_bytes(kind: str, numbers: int) -> int:
    """Bytes of a row of so many numbers."""
    return numbers + SCALE if kind in FLOATS else ggml.packed_bytes(kind, numbers)


def pack_floats(values: Tensor, scales: Tensor) -> Tensor:
    """Rows (n, columns) of 8-bit floats as bytes, and their scales (n, 1) in float32, as rows (n, bytes) in uint8."""
    return torch.cat([values.view(torch.uint8), scales.contiguous().view(torch.uint8)], dim=1)


def widen(packed: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Rows (n, bytes) in uint8 as numbers (n, columns) in `dtype`, rounded to it once."""
    if kind not in FLOATS:
        return ggml.widen(packed, kind, dtype)
    columns = packed.shape[1] - SCALE
    values = packed[:, :columns].view(FLOATS[kind])
    scales = packed[:, columns:].clone(memory_format=torch.contiguous_format).view(torch.float32)  # (n, 1)
    rows = packed.new_empty((len(packed), columns), dtype=dtype)
    step = max(1, ggml.PIECE // max(1, columns))
    for first in range(0, len(packed), step):
        part = slice(first, first + step)
        rows[part] = values[part].float() * scales[part]
    return rows


def are_finite(raw: Tensor, kind: str) -> bool:
    """Whether all numbers are in rows (n, bytes) as the file has them, those of 8-bit floats without their scales."""
    if kind not in FLOATS:
        return ggml.are_finite(raw, kind)
    return not raw.numel() or int((raw & _MAGNITUDE).max()) <= _LARGEST[kind]
