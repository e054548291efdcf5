"""Writes a random ControlNet for this package's checkpoints: a folder in diffusers' layout, or a file as published.

The values are `weights`'; what is written is read by diffusers' `ZImageControlNetModel` and by zimage alike.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from .checkpoint import SizeName
from .configs import SIZES, DtypeName, controlnet_config
from .weights import Values, tensor_shapes

Version = Literal["1.0", "2.0", "2.1"]


def build_controlnet(
    target: str | os.PathLike[str],
    *,
    size: SizeName = "tiny",
    version: Version = "2.1",
    dtype: DtypeName | None = None,
    seed: int = 0,
) -> Path:
    """Write a ControlNet with random weights for `build_checkpoint`'s models of a `size`; return `target`.

    To a name that ends in `.safetensors` goes one file, as `alibaba-pai` publishes them, else a new folder with a
    config. `version` is that of Z-Image-Turbo-Fun-Controlnet-Union: those from 2.0 on also see a mask and what is
    repainted; that of 2.0 has blocks in its file that nobody trained or uses. Raises `ValueError` for others.
    """
    path = Path(target)
    if size not in SIZES or version not in ("1.0", "2.0", "2.1"):
        raise ValueError(
            f"size must be one of {', '.join(SIZES)} and version 1.0, 2.0 or 2.1; got {size!r}, {version!r}"
        )
    single = path.suffix == ".safetensors"
    config = controlnet_config(SIZES[size], version)
    written = (
        {**config, "add_control_noise_refiner": "control_noise_refiner"} if single and version == "2.0" else config
    )
    values = Values(
        component="controlnet", size=SIZES[size], seed=seed, dtype=getattr(torch, dtype or SIZES[size].dtype)
    )
    tensors = {name: values.tensor(name, shape) for name, shape in tensor_shapes("controlnet", written).items()}
    if written is not config:
        tensors = {name: _untrained(name, tensor) for name, tensor in tensors.items()}
    if not single:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, path if single else path / "diffusion_pytorch_model.safetensors")
    return path


def _untrained(name: str, tensor: Any) -> Any:
    """The projections of blocks that nobody trained are 0."""
    return torch.zeros_like(tensor) if name.startswith("control_noise_refiner.") and "_proj." in name else tensor
