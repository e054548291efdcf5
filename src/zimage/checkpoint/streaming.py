"""Layers that a plan streams, each with its bytes on the host or in the checkpoint's files."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..memory.ring import STAYS, Field, Layer, bind, layout
from ..models.quantized import StoredLinear
from .modules import Blank
from .shards import Weights
from .tensors import LayerFile


def moves(target: str, streamed: Sequence[str]) -> bool:
    """Whether the parameter `target` goes with one of the `streamed` modules."""
    return STAYS not in target and any(target.startswith(f"{name}.") for name in streamed)


def streamed_layer(
    blank: Blank, weights: Weights, name: str, *, source: str, dtype: torch.dtype, device: torch.device
) -> Layer:
    """The module `name` as a layer that passes through: `source` "memory" holds its bytes on the host, "files" reads
    them each time."""
    module = blank.module.get_submodule(name)
    for owner in module.modules():
        for one, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta and not (isinstance(owner, StoredLinear) and one != "bias"):
                parameter.data = parameter.data.to(dtype)
    fields, size = layout(module)
    file = layer_file(blank, weights, name, fields)
    if source == "files":
        return Layer(module, fields, size, file)
    buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    file(buffer)
    bind(fields, buffer)
    return Layer(module, fields, size, buffer)


def layer_file(blank: Blank, weights: Weights, name: str, fields: Sequence[Field]) -> LayerFile:
    """What reads the `fields` of the module `name` from the files."""
    by_target = {f"{name}.{field.path}": field for field in fields}
    stored = {found: to for found, to in blank.targets.items() if to in by_target}
    scales = {found: f"{to.removesuffix('weight')}scale" for found, to in stored.items()}
    return LayerFile(
        weights,
        {found: by_target[to] for found, to in stored.items()},
        {found: by_target[to] for found, to in scales.items() if to in by_target},
    )
