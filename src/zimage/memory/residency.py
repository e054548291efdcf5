"""Carries a plan out: which layers of the models pass through the device, and the ring in which they take turns.

A layer that shall pass through is taken off the device, into the host's memory or back to its file. The text encoder's
layers are announced by hooks, the transformer's by its own `hold`. Knows which modules pass through, not why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import NotEnoughMemory, RequestError
from .copiers import CudaCopier, HostCopier, Source
from .plan import Placement
from .ring import Copier, Field, Layer, Ring, bind, host_buffers, layout

Reader = Callable[[str, str, Sequence[Field]], Source]
"""What reads a layer from its files: for "text_encoder" or "transformer", the layer's name in it, and its fields."""

_HOST = torch.device("cpu")


class Residency:
    """Where the layers of a pipeline's two large models are.

    Nothing of it is left on the modules after `close`, but that parameters which were taken off the device are not on
    it, and that their model's `hold` says so. For one thread at a time.
    """

    def __init__(
        self,
        text_encoder: Any,
        transformer: Any,
        *,
        placement: Placement | None = None,
        device: torch.device = _HOST,
        layers: Sequence[Layer] = (),
        read: Reader | None = None,
    ) -> None:
        """`layers` are off the device already, as `placement` has it; without `read` nothing can go back to files.

        `text_encoder` is None where another's residency moves it.
        """
        self.read = read
        self._models = {"text_encoder": text_encoder, "transformer": transformer}
        if text_encoder is None:
            del self._models["text_encoder"]
        self._layers: dict[nn.Module, Layer] = {layer.module: layer for layer in layers}
        self._ring: Ring | None = None
        self._ring_of = 0
        self._hooks: list[Any] = []
        self._slots, self._device = placement.slots if placement else 0, device
        self._wire()

    @property
    def streams(self) -> bool:
        """Whether something passes through the device."""
        return bool(self._layers)

    def place(self, placement: Placement, device: torch.device) -> None:
        """Take off `device` what `placement` streams and is not yet away, and put all else there.

        Raises `NotEnoughMemory` where a layer that should be read from its file is not what the file holds any more.
        """
        self._unwire()
        self._slots, self._device = placement.slots, device
        try:
            for component, model in self._models.items():
                source = placement.text_source if component == "text_encoder" else placement.block_source
                names = [name for name in streamed_names(placement, component, model)
                         if self._is_to_be_taken(model.get_submodule(name), source)]  # fmt: skip
                if source == "files":
                    for name in names:
                        self._put_back(component, name)
                else:
                    self._take([model.get_submodule(name) for name in names], for_card=device.type == "cuda")
        finally:
            self._wire()
        apart = self._models.get("text_encoder") if placement.text_waits else None
        for model in self._models.values():
            for tensor in self._staying(model):
                tensor.data = tensor.data.to(_HOST if model is apart else device)

    def close(self) -> None:
        """Take the wiring off and let go of the models; what passed through stays where it waits, and whoever shares
        such a model and computes with it then is told so."""
        self._unwire()
        for model in self._passing():
            model.hold = _gone
        for module in self._layers:  # of a text encoder; a transformer's are held, not called
            module.register_forward_pre_hook(_gone)
        self._layers, self._models, self.read = {}, {}, None

    def _is_to_be_taken(self, module: nn.Module, source: str) -> bool:
        layer = self._layers.get(module)
        return layer is None or (source == "files" and isinstance(layer.source, torch.Tensor))

    def _take(self, modules: Sequence[nn.Module], *, for_card: bool) -> None:
        """Into the host's memory."""
        layouts = [layout(module) for module in modules]
        buffers = host_buffers([size for _, size in layouts], for_card=for_card)
        for module, (fields, size), buffer in zip(modules, layouts, buffers, strict=True):
            for one in fields:
                one.view(buffer).copy_(one.parameter)
            bind(fields, buffer)
            self._layers[module] = Layer(module, fields, size, buffer)

    def _put_back(self, component: str, name: str) -> None:
        """To its file, which has to hold what it is now."""
        module = self._models[component].get_submodule(name)
        fields, size = layout(module)
        buffer = torch.empty(size, dtype=torch.uint8, device=_HOST)
        assert self.read is not None
        read = self.read(component, name, fields)
        assert callable(read)
        read(buffer)
        for one in fields:
            if not torch.equal(_bytes(one.view(buffer)), _bytes(one.parameter.to(_HOST))):
                raise NotEnoughMemory(
                    f"{component}.{name}.{one.path} was changed after loading and cannot be read from its file again; "
                    "choose a smaller size, or load with the memory that is there"
                )
        bind(fields, buffer.to("meta"))
        self._layers[module] = Layer(module, fields, size, read)

    def _staying(self, model: Any) -> Iterator[torch.Tensor]:
        """Parameters and buffers of `model` that do not pass through."""
        moved = {id(one.parameter) for layer in self._layers.values() for one in layer.fields}
        for tensor in chain(model.parameters(), model.buffers()):
            if id(tensor) not in moved:
                yield tensor

    def _passing(self) -> list[Any]:
        """The models of which layers pass through."""
        return [model for model in self._models.values() if any(one in self._layers for one in model.modules())]

    def _wire(self) -> None:
        for layer in self._models["text_encoder"].layers if "text_encoder" in self._models else ():
            if layer in self._layers:
                self._hooks.append(layer.register_forward_pre_hook(self._enter))
                self._hooks.append(layer.register_forward_hook(self._leave, always_call=True))
        for model in self._passing():
            model.hold = self._hold

    def _unwire(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._models:
            for model in self._models.values():
                vars(model).pop("hold", None)
        self._ring = None

    def _turning(self) -> Ring:
        """The ring, made when a process first needs it: its places take memory of the device, and a thread fills them
        that a forked process does not have."""
        if self._ring is None or self._ring_of != os.getpid():
            self._ring_of = os.getpid()
            order = [
                self._layers[module]
                for model in self._models.values()
                for module in model.modules()
                if module in self._layers
            ]
            self._ring = Ring(order, self._slots, self._device, _copier(self._device, max(one.size for one in order)))
        return self._ring

    def _hold(self, block: nn.Module) -> AbstractContextManager[None]:
        return self._turning().hold(block)

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._turning().enter(module)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._ring is not None:
            self._ring.leave(module)


def _gone(*_: Any) -> NoReturn:
    raise RequestError(
        "layers of this model passed through the device for a pipeline that was closed, and nothing can be computed "
        "with them any more; load the model again, and close what shares a model together"
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


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


def _copier(device: torch.device, largest: int) -> Copier:
    return CudaCopier(device, largest) if device.type == "cuda" else HostCopier()
