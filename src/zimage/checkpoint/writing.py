"""Writes safetensors files and GGUF files tensor by tensor: of the values there is never more than one in memory.

What is written where is decided before, by the list of tensors; values are checked for being finite as they are when a
model is loaded. Knows no components. Formats: https://github.com/huggingface/safetensors#format and
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..memory.sizes import GGML_BLOCKS
from ..models import ggml, packed
from .folders import sync, write_json
from .gguf import ALIGNMENT, MAGIC, PACKED, PLAIN
from .outgoing import FLOAT8, Q8_0, Outgoing
from .shards import Shape, index_name, single_name
from .tensors import read_into

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALE, _MARKER = "scale_weight", "scaled_fp8"
_MARKED = 2
"""Numbers in the marker: with two ComfyUI widens weights for each product, with fewer it rounds activations as well."""
_GGML_TYPES = {name: number for number, name in (PLAIN | PACKED).items()}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""llama.cpp's numbers for what most of a file is stored as."""
_QUANTIZATION = 2


def write_safetensors(file: IO[bytes], tensors: Sequence[Outgoing], metadata: Mapping[str, str]) -> None:
    """Write a whole file; those in float8 get a scale each, one number, as ComfyUI reads them.

    The widest types come first, so that each begins at a multiple of its size.
    """
    narrow = [one for one in tensors if one.dtype == FLOAT8]
    extra: list[tuple[str, str, Shape, int]] = [(_scale_of(one.name), "F32", (), 4) for one in narrow]
    extra += [(_MARKER, FLOAT8, (_MARKED,), _MARKED)] if narrow else []
    described = [(one.name, one.dtype, one.shape, one.bytes) for one in tensors]
    order = sorted([*extra, *described], key=lambda row: -_itemsize(row[1]))
    entries, end = dict[str, Any](), 0
    for name, dtype, shape, count in order:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + count]}
        end += count
    header = json.dumps({"__metadata__": dict(metadata), **entries}, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    file.write(struct.pack("<Q", len(header)) + header)
    found, scales, data = {one.name: one for one in tensors}, dict[str, float](), 8 + len(header)
    for name, _, _, count in order:
        if name not in found:
            file.write(bytes(count))
        elif found[name].dtype == FLOAT8:
            scales[_scale_of(name)] = _write_float8(file, found[name])
        else:
            _write(file, _values(found[name], _DTYPES[found[name].dtype]))
    for name, scale in scales.items():
        file.seek(data + entries[name]["data_offsets"][0])
        file.write(struct.pack("<f", scale))


def write_gguf(file: IO[bytes], tensors: Sequence[Outgoing], architecture: str, name: str) -> None:
    """Write a whole GGUF file of version 3."""
    kinds = {one.dtype for one in tensors}
    main = next((kind for kind in (Q8_0, "BF16", "F16") if kind in kinds), "F32")
    described = _text("general.architecture") + struct.pack("<I", 8) + _text(architecture)
    described += _text("general.name") + struct.pack("<I", 8) + _text(name)
    described += _text("general.quantization_version") + struct.pack("<II", 4, _QUANTIZATION)
    described += _text("general.file_type") + struct.pack("<II", 4, _FILE_TYPES[main])
    listed, end = b"", 0
    for one in tensors:
        shape = tuple(reversed(one.shape))
        listed += _text(one.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        listed += struct.pack("<IQ", _GGML_TYPES[one.dtype], end)
        end = _aligned(end + _gguf_bytes(one))
    header = MAGIC + struct.pack("<IQQ", 3, len(tensors), 4) + described + listed
    file.write(header.ljust(_aligned(len(header)), b"\0"))
    for one in tensors:
        _write(
            file, ggml.pack_q8_0(_values(one, torch.float32)) if one.dtype == Q8_0 else _values(one, _DTYPES[one.dtype])
        )
        file.write(bytes(_aligned(_gguf_bytes(one)) - _gguf_bytes(one)))


def write_shards(folder: Path, component: str, tensors: Iterable[Outgoing], shard_bytes: int) -> list[Path]:
    """Write a component's files in the hub's layout, each of at most `shard_bytes` or one tensor; return them all."""
    shards: list[list[Outgoing]] = [[]]
    for one in tensors:
        if shards[-1] and sum(each.bytes for each in shards[-1]) + one.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(one)
    written, weight_map, single = list[Path](), dict[str, str](), single_name(component)
    for number, shard in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
        path = folder / single.replace(".safetensors", f"{part}.safetensors")
        with open(path, "wb") as file:
            write_safetensors(file, shard, {"format": "pt"})
            sync(file)
        weight_map |= {one.name: path.name for one in shard}
        written.append(path)
    if len(shards) > 1:
        total = sum(one.bytes for shard in shards for one in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        written.append(folder / index_name(component))
        write_json(written[-1], index)
    return written


def _values(one: Outgoing, dtype: torch.dtype) -> Tensor:
    """All of a tensor, its parts one after the other."""
    first = one.parts[0][2].shape
    if len(one.parts) == 1:
        whole = torch.empty(first, dtype=dtype, device="cpu")
        read_into(whole, *one.parts[0])
        return whole
    whole, begin = torch.empty(one.shape, dtype=dtype, device="cpu"), 0
    for header, name, entry in one.parts:
        read_into(whole[begin : begin + entry.shape[0]], header, name, entry)
        begin += entry.shape[0]
    return whole


def _write_float8(file: IO[bytes], one: Outgoing) -> float:
    """Write a tensor in float8 and return its scale, with which the largest number is the type's largest."""
    values = _values(one, torch.float32)
    kind = packed.FLOATS[FLOAT8]
    most = torch.finfo(kind).max
    low, high = values.aminmax()
    scale = float(torch.maximum(-low, high) / most) or 1.0
    _write(file, values.div_(scale).clamp_(-most, most).to(kind))
    return scale


def _write(file: IO[bytes], values: Tensor) -> None:
    file.write(memoryview(values.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _scale_of(name: str) -> str:
    return f"{name.removesuffix('weight')}{_SCALE}"


def _itemsize(dtype: str) -> int:
    return 1 if dtype == FLOAT8 else _DTYPES[dtype].itemsize


def _gguf_bytes(one: Outgoing) -> int:
    if one.dtype != Q8_0:
        return one.bytes
    numbers, count = GGML_BLOCKS[Q8_0]
    rows, columns = one.shape
    return rows * columns // numbers * count


def _text(words: str) -> bytes:
    encoded = words.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT
