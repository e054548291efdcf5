"""Reads the values of tensors from safetensors files, in the wanted type and on the wanted device.

Bytes are read, not mapped: each tensor gets memory of its own, aligned and private, no file stays open, and a file that
shrinks meanwhile is an error rather than a crash. Beyond the weights themselves one buffer of `CHUNK` bytes is held, so
float32 files become a bfloat16 model in the memory of the latter. Every value is checked for being finite.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..memory.ring import Field
from ..models.quantized import QuantizedLinear, quantize_rows
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
    staging = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for header in weights.headers:
        wanted = [(name, entry) for name, entry in header.entries.items() if name in targets]
        with open_regular(header.path) as file:
            for name, entry in sorted(wanted, key=lambda item: item[1].start):
                place, _, leaf = targets[name].rpartition(".")
                owner = module.get_submodule(place)
                if isinstance(owner, QuantizedLinear) and leaf == "weight":
                    weight, scale = (torch.empty_like(one, device=device) for one in (owner.weight, owner.scale))
                    _read_rows(file, header, name, entry, staging, owner.kind, weight, scale)
                    owner.weight, owner.scale = (nn.Parameter(one, requires_grad=False) for one in (weight, scale))
                    continue
                tensor = torch.empty(entry.shape, dtype=dtype, device=device)
                _read(file, header, name, entry, staging, tensor.view(-1))
                setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    for buffer_name, buffer in list(module.named_buffers()):
        place, _, leaf = buffer_name.rpartition(".")
        setattr(module.get_submodule(place), leaf, buffer.to(device))


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
        staging = torch.empty(0, dtype=torch.uint8)
        for header, entries in self._parts:
            if not entries:
                continue
            with open_regular(header.path) as file:
                if _stamp(file.fileno()) != self._stamps[header.path]:
                    raise CheckpointError(f"{header.path} has changed since the model was loaded; load it again")
                for name, entry in entries:
                    field = self._fields[name]
                    if _DTYPES[entry.dtype] != field.dtype and not len(staging):
                        staging = torch.empty(CHUNK, dtype=torch.uint8)
                    weight, scale = field.view(buffer), self._scales.get(name)
                    if scale is not None and isinstance(field.owner, QuantizedLinear):
                        _read_rows(file, header, name, entry, staging, field.owner.kind, weight, scale.view(buffer))
                    else:
                        _read(file, header, name, entry, staging, weight.view(-1))


def _stamp(file: Path | int) -> tuple[int, int, int]:
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read(file: BinaryIO, header: Header, name: str, entry: Entry, staging: Tensor, flat: Tensor) -> None:
    """Read a tensor into `flat`, which has its type and lies where it is wanted."""
    source, device = _DTYPES[entry.dtype], flat.device
    in_place = source == flat.dtype and device.type == "cpu"
    buffer = flat if in_place else staging.view(source)
    step = CHUNK // source.itemsize
    for begin in range(0, len(flat), step):
        part = flat[begin : begin + step]
        raw = buffer[begin : begin + step] if in_place else buffer[: len(part)]
        _read_into(file, header, entry.start + begin * source.itemsize, raw)
        if not in_place:
            part.copy_(raw.to(device) if device.type == "cuda" else raw)
        _require_finite(part, raw, header, name)


def _read_rows(
    file: BinaryIO,
    header: Header,
    name: str,
    entry: Entry,
    staging: Tensor,
    kind: str,
    weight: Tensor,
    scale: Tensor,
) -> None:
    """Read a matrix some rows at a time into a quantized `weight` and its `scale`."""
    (rows, columns), source = entry.shape, _DTYPES[entry.dtype]
    step = max(1, QUANTIZED // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        raw = staging.view(source)[: count * columns]
        _read_into(file, header, entry.start + first * columns * source.itemsize, raw)
        _require_finite(raw, raw, header, name)
        parts = quantize_rows(raw.view(count, columns).to(weight.device), kind)
        for whole, part in zip((weight, scale), parts, strict=True):
            whole[first : first + count].copy_(part)


def _read_into(file: BinaryIO, header: Header, position: int, raw: Tensor) -> None:
    view = memoryview(raw.view(torch.uint8).numpy())  # type: ignore[arg-type]
    try:
        file.seek(position)
        while len(view):
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{header.path} became shorter while it was read; load again when it is whole")
            view = view[count:]
    except OSError as error:
        raise CheckpointError(f"{header.path} cannot be read: {reason(error)}") from error


def _require_finite(part: Tensor, raw: Tensor, header: Header, name: str) -> None:
    # The extremes are NaN if any value is, and take no memory of their own.
    if all(math.isfinite(float(extreme)) for extreme in part.aminmax()):
        return
    where = f"{header.path}: the tensor {shown(name)}"
    if bool(torch.isfinite(raw).all()):
        largest, target = float(raw.double().abs().max()), str(part.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{where} has values up to {largest:g}, beyond the range of {target}; "
            "load with dtype='bfloat16' or 'float32'"
        )
    raise CheckpointError(
        f"{where} has values that are NaN or infinite; the file is damaged: download or copy it again"
    )
