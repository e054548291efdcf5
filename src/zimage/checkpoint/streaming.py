"""Layers that a plan streams, each with its bytes on the host or in the checkpoint's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch

from ..memory.ring import STAYS, Field, Layer, bind, host_buffers, layout
from ..models.quantized import StoredLinear
from .modules import Blank
from .shards import Weights
from .tensors import LayerFile


def moves(target: str, streamed: Sequence[str]) -> bool:
    """Whether the parameter `target` goes with one of the `streamed` modules."""
    return STAYS not in target and any(target.startswith(f"{name}.") for name in streamed)


def streamed_layers(
    blank: Blank, weights: Weights, names: Sequence[str], *, source: str, dtype: torch.dtype, device: torch.device
) -> Iterator[Layer]:
    """The modules `names` as layers that pass through: `source` "memory" holds their bytes on the host, "files" reads
    them each time."""
    modules = [blank.module.get_submodule(name) for name in names]
    for owner in chain.from_iterable(module.modules() for module in modules):
        for one, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta and not (isinstance(owner, StoredLinear) and one != "bias"):
                parameter.data = parameter.data.to(dtype)
    layouts = [layout(module) for module in modules]
    files = [layer_file(blank, weights, name, fields) for name, (fields, _) in zip(names, layouts, strict=True)]
    if source == "files":
        for module, (fields, size), file in zip(modules, layouts, files, strict=True):
            yield Layer(module, fields, size, file)
        return
    buffers = host_buffers([size for _, size in layouts], for_card=device.type == "cuda")
    for module, (fields, size), file, buffer in zip(modules, layouts, files, buffers, strict=True):
        file(buffer)
        bind(fields, buffer)
        yield Layer(module, fields, size, buffer)


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
