"""What a checkpoint folder holds, told without reading its weights: components, sizes, types, variant and problems.

The problems are all that loading would raise before it reads values: both make the same survey. `fingerprint` gives
weights an identity that is cheap enough to compute on every load.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..variants import detect_variant
from .configs import PARTS
from .headers import Header
from .reading import open_regular, reason
from .shards import Weights
from .single import read_component
from .survey import Survey, survey

SAMPLES, SAMPLE = 64, 4096
"""How many pieces of each file's data the fingerprint looks at, and the bytes of each."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file with weights and its size in bytes."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ComponentInspection:
    """A component with weights: how `model_index.json` calls its class, and what its files hold.

    `parameters` counts all on disk, `loaded_parameters` those that zimage loads: of the text encoder all but the
    last layer and what follows it. `dtypes` are the types of tensors on disk by the format's names.
    """

    name: str
    class_name: str | None
    parameters: int
    loaded_parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A checkpoint as it lies on disk. Without `problems` it loads, as long as its values are finite numbers.

    `variant` is None where the checkpoint does not tell, and `variant_reason` then says why; `sampler` and
    `guidance_scale` are None where it names none, so that the variant's are used; `fingerprint` is None where weights
    cannot be read.
    """

    folder: str
    variant: str | None
    variant_reason: str | None
    shift: float | None
    sampler: str | None
    guidance_scale: float | None
    components: tuple[ComponentInspection, ...]
    fingerprint: str | None
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return dataclasses.asdict(self)


def inspect_checkpoint(folder: str | os.PathLike[str], *, hub_id: str | None = None) -> Inspection:
    """Inspect the checkpoint in `folder`; raises `CheckpointError` only where there is no such folder.

    `hub_id`, where known, helps to tell the variant.
    """
    found = survey(Path(folder))
    variant = variant_reason = identity = None
    problems = [str(error) for error in found.errors]
    try:
        detected = detect_variant(variant=None, hub_id=hub_id, shift=found.configs.shift)
    except CheckpointError as error:
        variant_reason = str(error)
    else:
        variant = detected.name
        try:
            found.configs.own.applied_to(detected)
        except CheckpointError as error:
            problems.append(str(error))
    if len(found.weights) == len(PARTS):
        try:
            identity = _fingerprint(found.weights)
        except CheckpointError as error:
            problems.append(str(error))
    return Inspection(
        folder=str(found.folder),
        variant=variant,
        variant_reason=variant_reason,
        shift=found.configs.shift,
        sampler=found.configs.own.sampler,
        guidance_scale=found.configs.own.guidance_scale,
        components=tuple(_component(found, name) for name in PARTS),
        fingerprint=identity,
        problems=tuple(problems),
    )


def fingerprint(folder: str | os.PathLike[str], files: Mapping[str, Path] | None = None) -> str:
    """A sampled identity of the weights in `folder`, or in the `files` of components: 32 hex digits.

    It covers size and header of every file with weights and 64 evenly spaced pieces of 4 KiB of its data, and of those
    in the folder the name. So it tells one model from another and from a fine-tune of it, and it does not see a change
    of a few values between the pieces. Raises `CheckpointError` where files are missing or damaged.
    """
    files = files or {}
    return _fingerprint({component: read_component(Path(folder), component, files) for component in PARTS}, files)


def content_digest(weights: Weights) -> str:
    """A sampled identity of weights as `fingerprint` has it, whatever their files are called: 64 hex digits."""
    digest = hashlib.sha256()
    for header in weights.headers:
        for piece in (f"{header.size}\0".encode(), header.raw, *_samples(header)):
            digest.update(piece)
    return digest.hexdigest()


def _component(found: Survey, name: str) -> ComponentInspection:
    headers = found.weights[name].headers if name in found.weights else ()
    needed = found.blanks[name].needed if name in found.blanks else {}
    entries = {tensor: entry for header in headers for tensor, entry in header.entries.items()}
    return ComponentInspection(
        name=name,
        class_name=found.configs.classes[name] if found.configs.classes else None,
        parameters=sum(math.prod(entry.shape) for entry in entries.values()),
        loaded_parameters=sum(math.prod(entry.shape) for tensor, entry in entries.items() if tensor in needed),
        bytes=sum(header.size for header in headers),
        dtypes=tuple(sorted({entry.dtype for entry in entries.values()})),
        shards=tuple(Shard(name=header.path.name, bytes=header.size) for header in headers),
    )


def _fingerprint(weights: dict[str, Weights], files: Mapping[str, Path] | None = None) -> str:
    digest = hashlib.sha256()
    for component in sorted(weights):
        for header in weights[component].headers:
            name = "" if component in (files or {}) else header.path.name  # their users call those as they like
            digest.update(f"{component}/{name}\0{header.size}\0{len(header.raw)}\0".encode())
            digest.update(header.raw)
            for piece in _samples(header):
                digest.update(piece)
    return digest.hexdigest()[:32]


def _samples(header: Header) -> list[bytes]:
    start, end = header.data, header.size
    last = max(end - SAMPLE, start)
    positions = sorted({start + (last - start) * sample // (SAMPLES - 1) for sample in range(SAMPLES)})
    pieces = []
    with open_regular(header.path) as file:
        try:
            for position in positions:
                file.seek(position)
                pieces.append(file.read(min(SAMPLE, end - position)))
        except OSError as error:
            raise CheckpointError(f"{header.path} cannot be read: {reason(error)}") from error
    return pieces
