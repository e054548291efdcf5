"""Saves an adapter as a safetensors file, with the names of diffusers and PEFT or of ComfyUI; whole or not at all.

Values are those that were read, in their own type, but for those that take in what scales them. Knows no model.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..checkpoint.folders import target_path
from ..errors import RequestError
from ..files.atomic import write_atomically
from .adapter import Adapter, Delta
from .naming import published
from .source import NAMES

_NO_FILE = re.compile(r"\.{0,2}|.*[/\\:\0].*", re.DOTALL)
"""Names that lead out of a folder on some system, or are none."""
_HALVES = {"peft": ("lora_A", "lora_B"), "comfyui": ("lora_down", "lora_up")}


def save_adapter(
    adapter: Adapter, target: str | os.PathLike[str], *, name: str, naming: str = "peft", overwrite: bool = False
) -> Path:
    """Write `adapter` to the file `target`, or into the folder `target`; returns the file.

    In a folder it has the name that diffusers looks for, for ComfyUI that of the adapter. Raises `RequestError` for
    another `naming` and a name that no file can have, and `FileError` where the file cannot be written or exists.
    """
    if naming not in _HALVES:
        raise RequestError(f"naming must be {' or '.join(map(repr, _HALVES))}, got {naming!r}")
    path = target_path(target)
    if path.is_dir():
        path = path / (NAMES[0] if naming == "peft" else f"{_file_stem(name)}.safetensors")
    if path.suffix != ".safetensors":
        raise RequestError(f"an adapter is saved as a .safetensors file or into a folder that exists, got {path}")
    content = save(_tensors(adapter, naming), {"format": "pt"})
    write_atomically(path, lambda file: file.write(content), overwrite=overwrite)
    return path


def _file_stem(name: str) -> str:
    if _NO_FILE.fullmatch(name):
        raise RequestError(
            f"the adapter's name, {name!r}, cannot be that of a file in a folder; say the file, "
            "save_adapter('name.safetensors', ...), or load the adapter under another name"
        )
    return name


def _tensors(adapter: Adapter, naming: str) -> dict[str, Tensor]:
    """For ComfyUI `scale` is written as alpha, which all its readers divide by the rank, and only where it is not 1.

    In PEFT's names it is in `down`: diffusers gives every name a second "transformer." where a file has an alpha.
    """
    tensors = {}
    for module, delta in adapter.deltas.items():
        stem = f"transformer.{module}" if naming == "peft" else f"diffusion_model.{published(module)}"
        down, up = _HALVES[naming]
        tensors[f"{stem}.{down}.weight"] = _scaled(delta) if naming == "peft" else delta.down.clone()
        tensors[f"{stem}.{up}.weight"] = delta.up.contiguous().clone()
        if delta.scale != 1.0 and naming != "peft":
            tensors[f"{stem}.alpha"] = torch.tensor(delta.scale * delta.rank, dtype=torch.float64, device="cpu")
        if delta.magnitude is not None:
            if naming == "peft":
                tensors[f"{stem}.lora_magnitude_vector"] = delta.magnitude.clone()
            else:
                tensors[f"{stem}.dora_scale"] = delta.magnitude[:, None].clone()
    return tensors


def _scaled(delta: Delta) -> Tensor:
    """`scale * down` as layers compute with it, to the bit: in its own type where that holds it, else in float32."""
    if delta.scale == 1.0:
        return delta.down.clone()
    scaled = delta.down.float() * delta.scale
    own = scaled.to(delta.down.dtype)
    return own if torch.equal(own.float(), scaled) else scaled
