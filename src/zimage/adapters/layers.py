"""How a layer computes with adapters: beside its weights, which stay as they are, in full, in fewer bits or passing by.

A layer stays the same object with the same parameters and names, so all that knows it goes on: checkpoints, places that
layers pass through, hooks, the compiler. Only its class is another while adapters are on it, as in
`torch.nn.utils.parametrize`, and what they add is in its `__dict__`, which no state dict reads. Knows no pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..errors import AdapterError
from ..models.quantized import StoredLinear
from .adapter import Delta

Active = tuple[tuple[str, Tensor], ...]
"""Names and strengths of adapters that act, in the order in which they are added; a strength is () in float64."""


class Switch:
    """Which adapters act at the moment on the layers that share it; none, unless someone computes with them."""

    def __init__(self) -> None:
        self.active: Active = ()


@dataclass(frozen=True, eq=False)
class Part:
    """An adapter's part in one layer, where the layer computes and in its type.

    At strength s it adds `s * up @ down @ hidden` to the layer's result, and with `shift` (out,) `s * shift` times what
    the weights alone give: of DoRA, by how much rows grow.
    """

    down: Tensor  # (rank, in)
    up: Tensor  # (out, rank)
    shift: Tensor | None

    @property
    def bytes(self) -> int:
        tensors = [one for one in (self.down, self.up, self.shift) if one is not None]
        return sum(one.numel() * one.itemsize for one in tensors)

    def change(self, hidden: Tensor, plain: Tensor, bias: Tensor | None, strength: Tensor) -> Tensor:
        """What is added to `plain` (..., out), the layer's own result for `hidden` (..., in)."""
        change = F.linear(F.linear(hidden, self.down) * strength, self.up)
        if self.shift is None:
            return change
        return change + (plain if bias is None else plain - bias) * (self.shift * strength)


class AdaptedLayer(nn.Module):
    """What stands before the class of a linear layer while adapters are on it."""

    _switch: Switch
    _parts: dict[str, Part]
    bias: Tensor | None

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` (..., in) to (..., out); without an active adapter to the bit what the layer's own class gives."""
        plain: Tensor = super().forward(hidden)
        change: Tensor | None = None
        for name, strength in self._switch.active:
            part = self._parts.get(name)
            if part is not None:
                more = part.change(hidden, plain, self.bias, strength)
                change = more if change is None else change + more
        return plain if change is None else plain + change


def put_on(layer: Any, name: str, part: Part, switch: Switch) -> None:
    """Let `part` act on a linear layer when `switch` says so."""
    if not isinstance(layer, AdaptedLayer):
        vars(layer).update(_switch=switch, _parts={})
        plain: Any = type(layer)
        layer.__class__ = _adapted(plain)
    layer._parts[name] = part


def take_off(layer: Any, name: str) -> None:
    """The inverse of `put_on`; a layer without adapters is what it was before the first."""
    if not isinstance(layer, AdaptedLayer) or layer._parts.pop(name, None) is None or layer._parts:
        return
    layer.__class__ = type(layer).__bases__[1]
    del vars(layer)["_switch"], vars(layer)["_parts"]


def is_free(layer: Any, switch: Switch) -> bool:
    """Whether adapters of `switch` can be put on a layer: none of another's are there."""
    return not isinstance(layer, AdaptedLayer) or layer._switch is switch


def make_part(delta: Delta, layer: Any, device: torch.device, dtype: torch.dtype) -> Part:
    """`delta` as `layer` needs it; for DoRA the layer's weights must be there.

    What scales the product is taken into its smaller factor in float32, before it is rounded to `dtype`.
    """
    down, up = (one.to(device, torch.float32) for one in (delta.down, delta.up))
    down = down if delta.scale == 1.0 else down * delta.scale
    shift = None
    if delta.magnitude is not None:
        weight = _weight(layer)
        lengths = torch.addmm(weight, up, down).norm(dim=1)  # (out,)
        growth = torch.where(lengths > 0, delta.magnitude.to(device, torch.float32) / lengths, 1.0)
        up, shift = up * growth[:, None], (growth - 1.0).to(dtype)
    return Part(down.to(dtype), up.to(dtype), shift)


@torch.no_grad()
def _weight(layer: Any) -> Tensor:
    """The weights (out, in) of a layer in float32."""
    if isinstance(layer, StoredLinear):
        return layer.widened(torch.float32)
    if not layer.weight.is_floating_point() or layer.weight.shape != (layer.out_features, layer.in_features):
        raise AdapterError(
            f"DoRA needs the weights of its layers, which {type(layer).__name__} does not show; load the model in full"
        )
    return layer.weight.detach().float()


@cache
def _adapted(plain: Any) -> Any:
    """The class of layers of the class `plain` that adapters are on."""
    return type(f"Adapted{plain.__name__}", (AdaptedLayer, plain), {"__module__": __name__})
