"""What one file with weights is, by the names of its tensors: components of a model, an adapter or a ControlNet.

Only the header is read. Knows no configs, so not whether a component fits a model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .configs import PARTS
from .headers import Entry
from .names import bare_name, own_name
from .reading import shown
from .single import SUFFIXES, adapter_tensor, read_any, read_single

_LANDMARKS = {
    "transformer": "noise_refiner.0.attention_norm1.weight",
    "text_encoder": "layers.0.self_attn.q_proj.weight",
    "vae": "decoder.conv_in.weight",
}
"""A tensor of each component that no other has, by our name."""
_CONTROL = "control_layers.0."


@dataclass(frozen=True, kw_only=True)
class FilePart:
    """What a file holds: "transformer", "text_encoder", "vae", "adapter" or "controlnet", and how it is stored there.

    `bytes` are those of its tensors, `dtypes` their types by the format's names.
    """

    kind: str
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]


def identify(file: str | os.PathLike[str]) -> tuple[FilePart, ...]:
    """What is in a safetensors or GGUF file, whoever named its tensors; of a file with several components each.

    Raises `CheckpointError` for a file of another format, or one that is damaged or has nothing of these.
    """
    path = Path(file)
    if path.suffix.lower() not in ("", *SUFFIXES):  # in the hub's cache files have none
        raise CheckpointError(f"{path} is no .safetensors and no .gguf file; weights are read from those only")
    header = read_any(path)
    if adapter_tensor(header) is not None:
        return (_part("adapter", header.entries.values()),)
    if any(_CONTROL in name for name in header.entries):
        return (_part("controlnet", header.entries.values()),)
    found = [component for component in PARTS if _has(component, header.entries)]
    if not found:
        names = ", ".join(map(shown, list(header.entries)[:3])) or "none"
        raise CheckpointError(
            f"{path} has no transformer, text encoder or VAE as Z-Image has them, and is no LoRA and no ControlNet; "
            f"its {len(header.entries)} tensors begin with: {names}"
        )
    return tuple(_part(component, read_single(path, component).entries.values()) for component in found)


def _has(component: str, names: Collection[str]) -> bool:
    bare = (bare_name(component, name) for name in names)
    return _LANDMARKS[component] in {own_name(component, name) for name in bare if name is not None}


def _part(kind: str, entries: Iterable[Entry]) -> FilePart:
    entries = list(entries)
    return FilePart(
        kind=kind,
        parameters=sum(math.prod(entry.shape) for entry in entries),
        bytes=sum(entry.end - entry.start for entry in entries),
        dtypes=tuple(sorted({entry.dtype for entry in entries})),
    )
