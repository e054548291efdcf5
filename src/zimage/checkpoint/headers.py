"""The header of a safetensors file: which tensors it holds, of what type and shape, and where their bytes lie.

Reads the header alone, by the format's own rules (https://github.com/huggingface/safetensors#format): the tensors must
cover the data without gap or overlap and the file must end where they do. So a file that is cut short, padded or made
up is known before one value is read. Knows nothing of models, and no torch.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .reading import open_regular, parse_json, read_up_to, reason, shown

MAX_HEADER = 16 << 20
"""Largest header that is read, in bytes; the largest on the hub has about 50 thousand."""

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: its type by the format's name, its shape, and where its bytes are, from the file's start.

    `scale` is another tensor of the file, of one number or of one for each row, that its values are multiplied with.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    scale: Entry | None = None


@dataclass(frozen=True)
class Header:
    """What one file holds: `entries` by tensor name, `raw` the header's bytes, `size` those of the file.

    `data` is where the values begin, `architecture` what a GGUF file calls its model.
    """

    path: Path
    entries: dict[str, Entry]
    raw: bytes
    size: int
    data: int
    architecture: str | None = None


def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file at `path`; raises `CheckpointError` naming the file."""
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size == 0:
                raise _damaged(path, "it is empty")
            if size < 8 or length > size - 8:
                raise _damaged(path, f"its header should have {length} bytes and the file has {size}")
            if length > MAX_HEADER:
                raise _damaged(path, f"its header should have {length} bytes, at most {MAX_HEADER} are read")
            raw = read_up_to(file, length)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    described = parse_json(raw, f"{path} (the safetensors header)")
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "the metadata in its header is not text")
    entries = {name: _entry(path, name, tensor, 8 + length) for name, tensor in described.items()}
    _require_cover(path, entries, 8 + length, size)
    return Header(path=path, entries=entries, raw=raw, size=size, data=8 + length)


def _entry(path: Path, name: str, tensor: Any, data: int) -> Entry:
    if not isinstance(tensor, dict) or set(tensor) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"its header does not describe {shown(name)} by dtype, shape and data_offsets")
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(path, f"{shown(name)} has the unknown type {shown(dtype)}")
    if not _are_sizes(shape) or len(shape) > 16 or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{shown(name)} has the shape {shown(shape)} at the offsets {shown(offsets)}")
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _damaged(path, f"{shown(name)} ({dtype} {shown(shape)}) does not fit its {end - start} bytes")
    return Entry(dtype=dtype, shape=tuple(shape), start=data + start, end=data + end)


def _are_sizes(values: Any) -> bool:
    # Each below 2**63 and at most 16 of them: their product stays cheap to compute.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _require_cover(path: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    position = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            relation = "overlaps the tensor before it" if entry.start < position else "does not follow the one before"
            raise _damaged(path, f"{shown(name)} {relation}")
        position = entry.end
    if position != size:
        raise _damaged(path, f"its tensors end at byte {position} and the file has {size} bytes")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a whole safetensors file: {what}; download or copy it again")
