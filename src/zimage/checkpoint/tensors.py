"""Reads the values of tensors from safetensors and GGUF files, in the wanted type and on the wanted device.

Bytes are read, not mapped: each tensor gets memory of its own, aligned and private, no file stays open, and a file that
shrinks meanwhile is an error rather than a crash. Beyond the weights themselves one buffer of `CHUNK` bytes is held, so
float32 files become a bfloat16 model in the memory of the latter. Every value is checked for being finite.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..memory.ring import Field, page_locked
from ..models import ggml, packed
from ..models.quantized import PackedLinear, QuantizedLinear, StoredLinear, quantize_rows
from .headers import Entry, Header
from .reading import open_regular, reason, shown
from .shards import Weights

CHUNK = 32 << 20
"""Bytes that are read at a time."""
QUANTIZED = 1 << 21
"""Numbers that are quantized at a time, in float32 beside what is read."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def fill(
    module: nn.Module, weights: Weights, targets: Mapping[str, str], *, dtype: torch.dtype, device: torch.device
) -> None:
    """Give `module` its parameters: `targets` maps the names of tensors in the files to those in the module."""
    staging = _Staging(pinned=device.type == "cuda")
    for header in weights.headers:
        wanted = [(name, entry) for name, entry in header.entries.items() if name in targets]
        with open_regular(header.path) as file:
            for name, entry in sorted(wanted, key=lambda item: item[1].start):
                place, _, leaf = targets[name].rpartition(".")
                owner = module.get_submodule(place)
                wanted_as, scale = torch.empty(entry.shape, dtype=dtype, device="meta"), None
                if isinstance(owner, StoredLinear) and leaf == "weight":
                    wanted_as = owner.weight
                    scale = torch.empty_like(owner.scale, device=device) if isinstance(owner, QuantizedLinear) else None
                tensor = torch.empty_like(wanted_as, device=device)
                _Source(file, header, name, entry, staging).read(owner, tensor, scale)
                setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
                if scale is not None:
                    owner.scale = nn.Parameter(scale, requires_grad=False)
    for buffer_name, buffer in list(module.named_buffers()):
        place, _, leaf = buffer_name.rpartition(".")
        setattr(module.get_submodule(place), leaf, buffer.to(device))


def read_into(tensor: Tensor, header: Header, name: str, entry: Entry) -> None:
    """Read the tensor `name` of a file into `tensor`, of its shape, on the host; its values are finite in its type."""
    with open_regular(header.path) as file:
        _Source(file, header, name, entry, _Staging(pinned=False)).read(nn.Identity(), tensor, None)


class LayerFile:
    """The tensors of one layer in their files, to be read again and again into a flat buffer (see `memory.ring`).

    `fields` gives each tensor's place in the buffer by its name in the files, `scales` that of the scales of those that
    are quantized. A file that is not the one that was
    opened first is refused, so that a layer never comes from another model than the rest.
    """

    def __init__(self, weights: Weights, fields: Mapping[str, Field], scales: Mapping[str, Field]) -> None:
        self._parts = [
            (header, sorted(((name, entry) for name, entry in header.entries.items() if name in fields),
                            key=lambda item: item[1].start))
            for header in weights.headers
        ]  # fmt: skip
        self._fields, self._scales = fields, scales
        self._stamps = {header.path: _stamp(header.path) for header, entries in self._parts if entries}

    def __call__(self, buffer: Tensor) -> None:
        """Write the layer into `buffer`, a flat `uint8` tensor of the host."""
        staging = _Staging(pinned=False)
        for header, entries in self._parts:
            if not entries:
                continue
            with open_regular(header.path) as file:
                if _stamp(file.fileno()) != self._stamps[header.path]:
                    raise CheckpointError(f"{header.path} has changed since the model was loaded; load it again")
                for name, entry in entries:
                    field, scale = self._fields[name], self._scales.get(name)
                    source = _Source(file, header, name, entry, staging)
                    source.read(field.owner, field.view(buffer), None if scale is None else scale.view(buffer))


def _stamp(file: Path | int) -> tuple[int, int, int]:
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


class _Staging:
    """What values pass through on their way from a file: `CHUNK` bytes of the host, made when they are first needed."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned, self._buffer = pinned, torch.empty(0, dtype=torch.uint8, device="cpu")

    def view(self, dtype: torch.dtype) -> Tensor:
        if not len(self._buffer):
            self._buffer = page_locked(CHUNK) if self._pinned else torch.empty(CHUNK, dtype=torch.uint8, device="cpu")
        return self._buffer.view(dtype)


@dataclass(frozen=True)
class _Source:
    """A tensor in an open file."""

    file: BinaryIO
    header: Header
    name: str
    entry: Entry
    staging: _Staging

    def read(self, owner: nn.Module, tensor: Tensor, scale: Tensor | None) -> None:
        """Read it into `tensor`, a parameter of `owner` where that is wanted, as `owner` stores it."""
        if isinstance(owner, PackedLinear) and self.entry.dtype in packed.KINDS:
            self._read_packed(tensor)
        elif self.entry.dtype in ggml.KINDS:
            self._read_widened(tensor)
        elif scale is not None and isinstance(owner, QuantizedLinear):
            self._read_rows(tensor, scale, owner.kind)
        elif self.entry.dtype in packed.FLOATS or self.entry.scale is not None:
            self._read_scaled(tensor)
        else:
            self._read_plain(tensor.view(-1))

    def _read_plain(self, flat: Tensor) -> None:
        source, device = _DTYPES[self.entry.dtype], flat.device
        in_place = source == flat.dtype and device.type == "cpu"
        buffer = flat if in_place else self.staging.view(source)
        step = CHUNK // source.itemsize
        for begin in range(0, len(flat), step):
            part = flat[begin : begin + step]
            raw = buffer[begin : begin + step] if in_place else buffer[: len(part)]
            self._fetch(begin * source.itemsize, raw)
            if not in_place:
                part.copy_(raw.to(device) if device.type == "cuda" else raw)
            self._require_finite(part, raw)

    def _read_rows(self, weight: Tensor, scale: Tensor, kind: str) -> None:
        """A matrix some rows at a time into a quantized `weight` and its `scale`."""
        for first, rows in self._rows():
            parts = quantize_rows(rows.to(weight.device), kind)
            for whole, part in zip((weight, scale), parts, strict=True):
                whole[first : first + len(rows)].copy_(part)

    def _read_scaled(self, tensor: Tensor) -> None:
        """8-bit floats, or numbers with a scale, in the type of `tensor`."""
        rows = tensor.view(self._shape)
        for first, wide in self._rows():
            part = rows[first : first + len(wide)]
            part.copy_(wide.to(part.device))
            self._require_finite(part, wide)

    def _read_packed(self, weight: Tensor) -> None:
        """Rows (out, bytes) as they are in the file; of 8-bit floats with their scales."""
        floats = packed.FLOATS.get(self.entry.dtype)
        scales = None if floats is None else self._scales().expand(len(weight), 1)
        for first, raw in self._packed_rows(weight.shape[1] - (0 if scales is None else packed.SCALE)):
            part = slice(first, first + len(raw))
            weight[part].copy_(raw if scales is None else packed.pack_floats(raw, scales[part]))

    def _read_widened(self, tensor: Tensor) -> None:
        """Rows in fewer bits in the file, in the type of `tensor`."""
        rows = tensor.view(-1, tensor.shape[-1])
        for first, raw in self._packed_rows(ggml.packed_bytes(self.entry.dtype, tensor.shape[-1])):
            part = rows[first : first + len(raw)]
            part.copy_(ggml.widen(raw.to(tensor.device), self.entry.dtype, tensor.dtype))
            self._require_finite(part, raw)

    def _packed_rows(self, width: int) -> Iterator[tuple[int, Tensor]]:
        """Some rows (n, width) of bytes at a time with the number of the first; their scales are finite."""
        step = max(1, min(CHUNK, ggml.PIECE) // width)
        for first in range(0, (self.entry.end - self.entry.start) // width, step):
            count = min(step, (self.entry.end - self.entry.start) // width - first)
            raw = self.staging.view(torch.uint8)[: count * width].view(count, width)
            self._fetch(first * width, raw.view(-1))
            if not packed.are_finite(raw, self.entry.dtype):
                raise self._not_finite()
            yield first, raw

    def _rows(self) -> Iterator[tuple[int, Tensor]]:
        """Some rows (n, columns) at a time with the number of the first, in the file's type or, of 8-bit floats and
        those that have scales, the products in float32. They are finite."""
        (count, columns), source = self._shape, (_DTYPES | packed.FLOATS)[self.entry.dtype]
        scales = None if self.entry.dtype in _DTYPES and self.entry.scale is None else self._scales().expand(count, 1)
        step = max(1, QUANTIZED // columns)
        for first in range(0, count, step):
            part = slice(first, min(first + step, count))
            raw = self.staging.view(source)[: (part.stop - first) * columns]
            self._fetch(first * columns * source.itemsize, raw)
            wide = raw.view(-1, columns) if scales is None else raw.view(-1, columns).float() * scales[part]
            self._require_finite(wide, wide)
            yield first, wide

    @property
    def _shape(self) -> tuple[int, int]:
        """Rows and columns, also of what is no matrix: a scale is of the first dimension's."""
        rows = self.entry.shape[0] if self.entry.shape else 1
        return rows, math.prod(self.entry.shape) // max(1, rows)

    def _scales(self) -> Tensor:
        """What rows are multiplied with, (rows, 1) or (1, 1) in float32: 1 where the file says nothing."""
        entry = self.entry.scale
        if entry is None:
            return torch.ones(1, 1, dtype=torch.float32, device="cpu")
        raw = torch.empty(math.prod(entry.shape), dtype=_DTYPES[entry.dtype], device="cpu")
        self._fetch(entry.start - self.entry.start, raw)
        if not bool(torch.isfinite(raw).all()):
            raise self._not_finite()
        return raw.float().view(-1, 1)

    def _fetch(self, begin: int, raw: Tensor) -> None:
        """Fill `raw` with the bytes from `begin` on."""
        view = memoryview(raw.view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            self.file.seek(self.entry.start + begin)
            while len(view):
                count = self.file.readinto(view)  # type: ignore[attr-defined]
                if not count:
                    raise CheckpointError(
                        f"{self.header.path} became shorter while it was read; load again when it is whole"
                    )
                view = view[count:]
        except OSError as error:
            raise CheckpointError(f"{self.header.path} cannot be read: {reason(error)}") from error

    def _require_finite(self, part: Tensor, raw: Tensor) -> None:
        # The extremes are NaN if any value is, and take no memory of their own.
        if all(math.isfinite(float(extreme)) for extreme in part.aminmax()):
            return
        if self.entry.dtype in ggml.KINDS:
            raw = ggml.widen(raw, self.entry.dtype, torch.float32)
        if not bool(torch.isfinite(raw).all()):
            raise self._not_finite()
        largest, target = float(raw.double().abs().max()), str(part.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{self._where} has values up to {largest:g}, beyond the range of {target}; "
            "load with dtype='bfloat16' or 'float32'"
        )

    def _not_finite(self) -> CheckpointError:
        return CheckpointError(
            f"{self._where} has values that are NaN or infinite; the file is damaged: download or copy it again"
        )

    @property
    def _where(self) -> str:
        return f"{self.header.path}: the tensor {shown(self.name)}"
