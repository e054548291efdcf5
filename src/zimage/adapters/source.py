"""From what a user calls a LoRA to its tensors: a hub id, a folder or a file, read whole and checked.

Only safetensors is read. Every failure is an `AdapterError`. Knows no layers and no model.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.headers import Entry, Header, read_header
from ..checkpoint.hub import Repository, named_on_hub, or_here
from ..checkpoint.reading import MAX_CONFIG, exists, open_regular, parse_json, read_bytes, reason, shown
from ..errors import AdapterError, CheckpointError
from .adapter import Scaling

NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call the file in a folder or repository."""
CONFIG = "adapter_config.json"
"""PEFT's, beside it."""
METADATA_CONFIG = "lora_adapter_metadata"
"""Where diffusers keeps the same in the file, with "transformer." before each name."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WHOLE = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
"""Of single numbers: some trainers write alpha so."""
HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})(?:/([\w./ -]{1,200}\.safetensors))?", re.ASCII)
_PLAIN = re.compile(r"\^?[\w.-]{1,200}\$?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A LoRA's file, PEFT's config beside it if there is one, and what it is called; `hub` if it is from there."""

    file: Path
    config: Path | None
    name: str
    hub: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Content:
    """All that a file holds: tensors, metadata, its SHA-256, and what stands for alpha where that is missing.

    With PEFT's config beside it the digest is of both, the file first, for that decides too.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    digest: str
    scaling: Scaling


def locate_adapter(
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Place:
    """Find the file that `source` means: a file, a folder, a hub id, or "owner/name/file.safetensors" on the hub.

    `weight_name` names the file in a folder or repository. Raises `AdapterError`.
    """
    if isinstance(source, Mapping):
        raise AdapterError(
            "a LoRA is read from its file, got a state dict; write that with safetensors.torch.save_file and pass it"
        )
    with as_adapter_error():
        try:
            path = Path(source).expanduser()
            is_there = path.exists()
        except (RuntimeError, TypeError, ValueError, OSError) as error:
            raise AdapterError(
                f"a LoRA is a file, a folder or a hub id, got {shown(source)}: {reason(error)}"
            ) from error
        if is_there and not path.is_dir():
            if weight_name is not None:
                raise AdapterError(f"{path} is a file, so weight_name={weight_name!r} says nothing; leave it out")
            _require_safetensors(path.name)
            return _place(path, str(path))
        if is_there:
            return _place(_in_folder(path, weight_name), str(path))
        found = named_on_hub(source, HUB_FILE)
        if found is None or (found[2] and weight_name):
            raise AdapterError(
                f"cannot find the LoRA {shown(str(source))}: there is no such file or folder here, and it is no hub id"
            )
        repository = Repository(
            found[1], revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
        with or_here(str(source)):
            file, name = _on_hub(repository, found[2] or weight_name)
        config = repository.fetch(CONFIG) if name == NAMES[1] else None
        return Place(file=file, config=config, name=f"{found[1]}/{name}", hub=True)


def read_content(place: Place) -> Content:
    """Read a LoRA's file, whole. Raises `AdapterError` for one that is cut short, padded, or of foreign types."""
    with as_adapter_error():
        header = read_header(place.file)
        metadata = parse_json(header.raw, str(place.file)).get("__metadata__", {})
        beside = None if place.config is None else read_bytes(place.config, MAX_CONFIG)
        config = _config(place, beside, metadata)
        digest = hashlib.sha256(len(header.raw).to_bytes(8, "little") + header.raw)
        tensors = {}
        entries = sorted(header.entries.items(), key=lambda item: (item[1].start, item[1].end))
        with open_regular(place.file) as file:
            try:
                file.seek(header.data)
                for name, entry in entries:
                    tensors[name], content = _read(file, entry, name, header)
                    digest.update(content)
            except OSError as error:
                raise AdapterError(f"{place.file} cannot be read: {reason(error)}") from error
        digest.update(beside or b"")
        names = {key: str(config[key]) for key in ("base_model_name_or_path",) if config.get(key)}
        return Content(
            tensors={name: tensors[name] for name in header.entries},
            metadata={**names, **metadata},
            digest=digest.hexdigest(),
            scaling=_scaling(config, str(place.config or place.file)),
        )


def _place(file: Path, name: str) -> Place:
    config = file.with_name(CONFIG)
    return Place(file=file, config=config if file.name == NAMES[1] and exists(config) else None, name=name)


def _in_folder(folder: Path, weight_name: str | None) -> Path:
    if weight_name is not None:
        _require_safetensors(weight_name)
        if not exists(folder / weight_name):
            raise AdapterError(f"{folder} has no {weight_name}; give a weight_name that it has")
        return folder / weight_name
    named = [folder / name for name in NAMES if exists(folder / name)]
    found = named or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        came = ", ".join(path.name for path in found[:5]) or "no .safetensors file"
        raise AdapterError(f"{folder} should hold one LoRA and has {came}; name the file with weight_name")
    return found[0]


def _on_hub(repository: Repository, wanted: str | None) -> tuple[Path, str]:
    if wanted is not None:
        _require_safetensors(wanted)
        return repository.require(wanted, "see which files it has on its page"), wanted
    for name in NAMES:
        file = repository.fetch(name)
        if file is not None:
            return file, name
    file = repository.require(NAMES[0], "nor a file of PEFT's name; name the one that it has with weight_name")
    return file, NAMES[0]


def _require_safetensors(name: str) -> None:
    if not name.lower().endswith(".safetensors"):
        raise AdapterError(
            f"a LoRA is read from a .safetensors file, got {shown(name)}; pickles (.pt, .bin, .ckpt) can run code and "
            "are never read: convert it where you trust it"
        )


def _read(file: Any, entry: Entry, name: str, header: Header) -> tuple[Tensor, Any]:
    """A tensor in memory of its own, aligned as torch aligns, and its bytes."""
    types = _DTYPES | _WHOLE if math.prod(entry.shape) == 1 else _DTYPES
    if entry.dtype not in types:
        raise AdapterError(
            f"{header.path}: {shown(name)} is of the type {entry.dtype}; LoRAs are read in {', '.join(_DTYPES)}, only "
            "alpha may be a whole number"
        )
    raw = torch.empty(entry.end - entry.start, dtype=torch.uint8, device="cpu")
    content = view = memoryview(raw.numpy())  # type: ignore[arg-type]
    while len(view):
        count = file.readinto(view)
        if not count:
            raise AdapterError(f"{header.path} became shorter while it was read; load it again when it is whole")
        view = view[count:]
    return raw.view(types[entry.dtype]).view(entry.shape), content


def _config(place: Place, beside: bytes | None, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's config, from its own file or from what diffusers writes into the metadata."""
    if beside is not None:
        return parse_json(beside, str(place.config))
    if METADATA_CONFIG not in metadata:
        return {}
    packed = parse_json(metadata[METADATA_CONFIG].encode(), f"{place.file} ({METADATA_CONFIG})")
    return {key.removeprefix("transformer."): value for key, value in packed.items() if key.startswith("transformer.")}


def _scaling(config: Mapping[str, Any], where: str) -> Scaling:
    alpha, exceptions = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(exceptions, Mapping):
        raise AdapterError(f"{where}: alpha_pattern must say the alpha of layers by name, got {shown(exceptions)}")
    for name, value in {"lora_alpha": alpha, **exceptions}.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6
        if not is_number and not (name == "lora_alpha" and value is None):
            raise AdapterError(f"{where}: the alpha of {shown(name)} must be a number, got {shown(value)}")
    odd = [name for name in exceptions if not _PLAIN.fullmatch(name)]
    if odd:
        raise AdapterError(f"{where}: alpha_pattern is read by plain names only, got {shown(odd[0])}; write them out")
    return Scaling(
        alpha=None if alpha is None else float(alpha),
        by_module={name: float(value) for name, value in exceptions.items()},
        by_root=config.get("use_rslora") is True,
    )


@contextmanager
def as_adapter_error() -> Iterator[None]:
    """What is wrong with a file is wrong with the adapter."""
    try:
        yield
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
