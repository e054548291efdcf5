"""A transformer in one file, safetensors or GGUF, in diffusers' names or those that Z-Image was published with.

The published names are those of the official code, which ComfyUI and most GGUF files use; there queries, keys and
values are one matrix. Since rows lie one after the other, its parts are tensors of the same file: nothing is converted,
entries get other names and places. Knows names, not values.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError
from .gguf import is_gguf, read_gguf_header
from .headers import Entry, read_header
from .shards import Weights, read_weights

SUFFIXES = (".safetensors", ".gguf")

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_RENAMED = (
    (re.compile(r"^final_layer\."), "all_final_layer.2-1."),
    (re.compile(r"^x_embedder\."), "all_x_embedder.2-1."),
    (re.compile(r"\.attention\.q_norm\."), ".attention.norm_q."),
    (re.compile(r"\.attention\.k_norm\."), ".attention.norm_k."),
    (re.compile(r"\.attention\.out\."), ".attention.to_out.0."),
)
_FUSED = ".attention.qkv."
_UNREAD = ("norm_final.weight",)
"""In published files, and of no use."""


def read_component(folder: Path, component: str, transformer: Path | None) -> Weights:
    """The headers of a component's files in the checkpoint `folder`, of the transformer's own file if there is one."""
    if transformer is not None and component == "transformer":
        return read_single(transformer)
    return read_weights(folder, component)


def read_single(path: Path) -> Weights:
    """The tensors in the file of a transformer, by diffusers' names; raises `CheckpointError` naming it."""
    header = read_gguf_header(path) if is_gguf(path) else read_header(path)
    entries: dict[str, Entry] = {}
    for name, entry in header.entries.items():
        for own_name, part in _own(name, entry):
            if own_name in entries:
                raise CheckpointError(f"{path} has {own_name} twice, in two ways of naming; take another file")
            entries[own_name] = part
    return Weights((replace(header, entries=entries),))


def _own(name: str, entry: Entry) -> list[tuple[str, Entry]]:
    """Diffusers' names for a tensor, with the part of it that each has."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for pattern, renamed in _RENAMED:
        name = pattern.sub(renamed, name)
    if name in _UNREAD:
        return []
    if name.endswith("_pad_token") and len(entry.shape) == 1:
        entry = replace(entry, shape=(1, *entry.shape))  # some writers of GGUF leave such dimensions out
    if _FUSED not in name or not entry.shape or entry.shape[0] % 3:
        return [(name, entry)]
    rows, count = entry.shape[0] // 3, (entry.end - entry.start) // 3
    return [
        (
            name.replace(_FUSED, f".attention.{part}."),
            replace(
                entry,
                shape=(rows, *entry.shape[1:]),
                start=entry.start + number * count,
                end=entry.start + (number + 1) * count,
            ),
        )
        for number, part in enumerate(("to_q", "to_k", "to_v"))
    ]
