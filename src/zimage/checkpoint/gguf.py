"""The header of a GGUF file: which tensors it holds, as what they are stored, and where their bytes lie.

Reads the header alone, by the format's own rules (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2
and 3). Of the file's own descriptions only the alignment and the architecture's name are looked at; tensors must follow
each other to the end of the file. Knows nothing of models, and no torch.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..memory.sizes import GGML_BLOCKS
from .headers import MAX_HEADER, Entry, Header
from .reading import open_regular, read_up_to, reason, shown

MAGIC = b"GGUF"
PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
PACKED = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    20: "IQ4_NL", 23: "IQ4_XS",
}  # fmt: skip
"""Types by their number in files."""
PLAIN_BYTES = {"F32": 4, "F16": 2, "F64": 8, "BF16": 2}

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a described value, by the number of its type."""
_TEXT, _ARRAY, _UINT32 = 8, 9, 4
_MAX_DIMENSIONS = 4
_MAX_DEPTH = 4
ALIGNMENT = 32
"""Where tensors begin is a multiple, if a file does not say otherwise."""


def is_gguf(path: Path) -> bool:
    """Whether the file at `path` begins as a GGUF file does."""
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf_header(path: Path) -> Header:
    """Read and check the header of the GGUF file at `path`; raises `CheckpointError` naming the file."""
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            content = read_up_to(file, MAX_HEADER)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    cursor = _Cursor(path, content, size)
    if cursor.take(4) != MAGIC:
        raise cursor.damaged("it does not begin with GGUF")
    version = cursor.number(4)
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF of version {version}; 2 and 3 are read, in little-endian order")
    tensors, described = cursor.number(8), cursor.number(8)
    alignment, architecture = ALIGNMENT, None
    for _ in range(described):
        name, kind = cursor.text(), cursor.number(4)
        if name == "general.alignment" and kind == _UINT32:
            alignment = cursor.number(4)
        elif name == "general.architecture" and kind == _TEXT:
            architecture = cursor.text()
        else:
            cursor.skip(kind)
    if not 1 <= alignment <= 1 << 20:
        raise cursor.damaged(f"its alignment is {alignment}")
    found = [cursor.tensor() for _ in range(tensors)]
    data = _aligned(cursor.position, alignment)
    entries: dict[str, Entry] = {}
    for name, dtype, shape, offset, count in found:
        if name in entries:
            raise cursor.damaged(f"{shown(name)} occurs twice")
        entries[name] = Entry(dtype=dtype, shape=shape, start=data + offset, end=data + offset + count)
    _require_cover(cursor, entries, data, alignment)
    raw = content[: cursor.position]
    return Header(path=path, entries=entries, raw=raw, size=size, data=data, architecture=architecture)


class _Cursor:
    """Reads one thing after the other from the beginning of a file."""

    def __init__(self, path: Path, content: bytes, size: int) -> None:
        self._path, self._content, self.size, self.position = path, content, size, 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is not a whole GGUF file: {what}; download or copy it again")

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._content):
            if len(self._content) == MAX_HEADER:
                raise self.damaged(f"its header has more than the {MAX_HEADER} bytes that are read")
            raise self.damaged(f"it ends within its header, at byte {self.size}")
        part = self._content[self.position : end]
        self.position = end
        return part

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def text(self) -> str:
        return self.take(self.number(8)).decode("utf-8", "replace")

    def skip(self, kind: int, depth: int = 0) -> None:
        """Pass over a value."""
        if kind == _TEXT:
            self.take(self.number(8))
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            inner, count = self.number(4), self.number(8)
            if inner in _SCALARS:
                self.take(_SCALARS[inner] * count)
                return
            for _ in range(count):
                self.skip(inner, depth + 1)
        elif kind in _SCALARS:
            self.take(_SCALARS[kind])
        else:
            raise self.damaged(f"a value has the unknown type {kind}")

    def tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape, offset in the data and bytes of the next tensor."""
        name, dimensions = self.text(), self.number(4)
        if dimensions > _MAX_DIMENSIONS:
            raise self.damaged(f"{shown(name)} has {dimensions} dimensions")
        shape = tuple(reversed([self.number(8) for _ in range(dimensions)]))  # files have the innermost first
        kind, offset = self.number(4), self.number(8)
        if math.prod(shape) >= 1 << 63:
            raise self.damaged(f"{shown(name)} has the shape {list(shape)}")
        if kind in PLAIN:
            dtype = PLAIN[kind]
            return name, dtype, shape, offset, math.prod(shape) * PLAIN_BYTES[dtype]
        if kind not in PACKED:
            known = ", ".join([*PLAIN.values(), *PACKED.values()])
            raise CheckpointError(
                f"{self._path} stores {shown(name)} as ggml's type {kind}, which is not read; take a file that has "
                f"its weights in {known}"
            )
        dtype = PACKED[kind]
        numbers, count = GGML_BLOCKS[dtype]
        if not shape or shape[-1] % numbers:
            raise self.damaged(f"{shown(name)} ({dtype}) has rows of {shape[-1:]} numbers, not a multiple of {numbers}")
        return name, dtype, shape, offset, math.prod(shape) // numbers * count


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _require_cover(cursor: _Cursor, entries: dict[str, Any], data: int, alignment: int) -> None:
    position = data
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != _aligned(position, alignment):
            raise cursor.damaged(f"{shown(name)} does not follow the tensor before it")
        position = entry.end
    if not position <= cursor.size <= max(_aligned(position, alignment), data):
        raise cursor.damaged(f"its tensors end at byte {position} and the file has {cursor.size} bytes")
