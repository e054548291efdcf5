"""Carries a plan out: the layers that it streams are on the device while they compute.

The text encoder's layers are announced by hooks, the transformer's by its own `hold`. Knows which modules pass through,
not why; nothing is left behind on the modules after `close`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .copiers import CudaCopier, HostCopier
from .plan import Placement
from .ring import Copier, Layer, Ring


class Residency:
    """The ring of a pipeline's streamed layers, wired to its models."""

    def __init__(
        self,
        placement: Placement,
        layers: Sequence[Layer],
        device: torch.device,
        *,
        text_encoder: Any,
        transformer: Any,
        copier: Copier | None = None,
    ) -> None:
        """Wire `layers` of the two models; `copier` is the device's own if not given."""
        largest = max(layer.size for layer in layers)
        self._ring = Ring(layers, placement.slots, device, copier or _copier(device, largest))
        self._transformer = transformer
        self._hooks = []
        for layer in text_encoder.layers:
            if placement.text_encoder == "streamed":
                self._hooks.append(layer.register_forward_pre_hook(self._enter))
                self._hooks.append(layer.register_forward_hook(self._leave, always_call=True))
        transformer.hold = self._ring.hold

    def close(self) -> None:
        """Take the wiring off again."""
        for hook in self._hooks:
            hook.remove()
        vars(self._transformer).pop("hold", None)

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._ring.enter(module)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self._ring.leave(module)


def _copier(device: torch.device, largest: int) -> Copier:
    return CudaCopier(device, largest) if device.type == "cuda" else HostCopier()
