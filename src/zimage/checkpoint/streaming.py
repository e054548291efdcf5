"""The layers that a plan streams: which they are, and each with its bytes on the host or in the checkpoint's files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..memory.plan import Placement
from ..memory.ring import STAYS, Layer, bind, layout
from .modules import Blank
from .shards import Weights
from .tensors import LayerFile


def streamed_names(placement: Placement, component: str, module: Any) -> list[str]:
    """The names of the modules in `component` that pass through the device, in the order in which they run."""
    if component == "text_encoder":
        streams = placement.text_encoder == "streamed"
        return [f"layers.{number}" for number in range(len(module.layers))] if streams else []
    if component != "transformer":
        return []
    context = [] if placement.context_resident else range(len(module.context_refiner))
    blocks = [f"noise_refiner.{number}" for number in range(len(module.noise_refiner))]
    blocks += [f"layers.{number}" for number in range(len(module.layers))]
    return [*(f"context_refiner.{number}" for number in context), *(blocks[number] for number in placement.streamed)]


def moves(target: str, streamed: Sequence[str]) -> bool:
    """Whether the parameter `target` goes with one of the `streamed` modules."""
    return STAYS not in target and any(target.startswith(f"{name}.") for name in streamed)


def streamed_layer(
    blank: Blank, weights: Weights, name: str, *, source: str, dtype: torch.dtype, device: torch.device
) -> Layer:
    """The module `name` as a layer that passes through: `source` "memory" holds its bytes on the host, "files" reads
    them each time."""
    module = blank.module.get_submodule(name)
    for parameter in module.parameters():
        if parameter.is_meta:
            parameter.data = parameter.data.to(dtype)
    fields, size = layout(module)
    by_target = {f"{name}.{field.path}": field for field in fields}
    file = LayerFile(weights, {stored: by_target[to] for stored, to in blank.targets.items() if to in by_target})
    if source == "files":
        return Layer(module, fields, size, file)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    file(buffer)
    bind(fields, buffer)
    return Layer(module, fields, size, buffer)
