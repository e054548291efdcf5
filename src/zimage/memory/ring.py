"""Layers that pass through a few places on the device: each is there while it computes, the next is on its way.

A layer's parameters are views of one flat buffer, so that a layer moves in one copy; nothing is written back, and
nothing is allocated after the start. `copiers` copy in the order that the ring asks for. Knows no models and no files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import ZImageWarning
from .ladder import is_out_of_memory
from .pages import together

ALIGNMENT = 256
"""Bytes: where each parameter begins is a multiple, as in memory that a device allocates."""

STAYS = "adaLN_modulation"
"""Part of a block that stays on the device: it is needed for all steps at once, before the first."""


class Copier(Protocol):
    """How layers come into their places.

    `start` begins to fill `place` once what `free` stands for has happened, and returns a ticket; a place that is let
    go of meanwhile is nobody else's memory before it is filled. `wait` lets what is computed from now on see the filled
    place; `mark` stands for all that is computed until now.
    """

    def start(self, place: Tensor, source: Any, free: Any) -> Any: ...

    def wait(self, ticket: Any) -> None: ...

    def mark(self) -> Any: ...


@dataclass(frozen=True)
class Field:
    """A parameter of a layer and where its bytes are in the layer's buffer."""

    owner: nn.Module
    name: str
    path: str
    """Its name in the layer."""
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def parameter(self) -> Tensor:
        """What is there now."""
        return getattr(self.owner, self.name)

    def view(self, buffer: Tensor) -> Tensor:
        """The parameter in a buffer that holds the layer."""
        count = self.shape.numel() * self.dtype.itemsize
        return buffer[self.offset : self.offset + count].view(self.dtype).view(self.shape)


@dataclass(frozen=True, eq=False)
class Layer:
    """A module that passes through: its parameters, the bytes of all, and where they come from."""

    module: nn.Module
    fields: tuple[Field, ...]
    size: int
    source: Any
    """What the copier fills a place from."""


@dataclass(eq=False)
class _Place:
    buffer: Tensor
    holds: Layer | None = None
    ticket: Any = None
    free: Any = None


def layout(module: nn.Module) -> tuple[tuple[Field, ...], int]:
    """Where each parameter of `module` that moves lies in a buffer for all of them, and that buffer's bytes."""
    fields, end = [], 0
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if path.startswith(STAYS):
                continue
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            fields.append(Field(owner, name, f"{path}.{name}".lstrip("."), begin, parameter.shape, parameter.dtype))
            end = begin + parameter.numel() * parameter.dtype.itemsize
    return tuple(fields), end


def host_buffers(sizes: Sequence[int], *, for_card: bool) -> Iterator[Tensor]:
    """For layers of so many bytes, in this order, flat buffers of the host, each allocated when it comes to it; those
    for a card page-locked, and together as `pages` has it."""
    if not for_card:
        yield from (torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes)
        return
    apart, begin = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes], 0
    for count in together(apart):
        end = begin + count
        both = page_locked(sum(apart[begin:end]))
        for size, buffer in zip(sizes[begin:end], both.split(apart[begin:end]), strict=True):
            yield buffer[:size]
        begin = end


def page_locked(size: int) -> Tensor:
    """A flat buffer of the host from which a card copies by itself; of ordinary memory, with a warning, where the
    system gives no more of such, as it may long before memory is short."""
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).splitlines()[0]
    warnings.warn(
        f"the system gives no more page-locked memory ({said}); weights wait in ordinary memory, from where they take "
        "longer to the device: free memory of the host and load again to have pictures as fast as planned",
        ZImageWarning,
        stacklevel=2,
    )
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def bind(fields: Sequence[Field], buffer: Tensor) -> None:
    """Let the parameters be views of `buffer`, whatever a second try in float32 does to operations around."""
    with torch._C.DisableTorchFunction():
        for one in fields:
            one.owner._parameters[one.name] = nn.Parameter(one.view(buffer), requires_grad=False)


class Ring:
    """A few places on a device and the layers that take turns in them, in the order in which they run.

    Which layer follows which is learned as they run, and what comes next is fetched meanwhile; a layer that was not
    foreseen is waited for. For one thread at a time.
    """

    def __init__(self, layers: Sequence[Layer], slots: int, device: torch.device, copier: Copier) -> None:
        size = max((layer.size for layer in layers), default=0)
        self._copier = copier
        self._layers: Mapping[nn.Module, Layer] = {layer.module: layer for layer in layers}
        with torch.inference_mode(False):  # or what is not in that mode, as a copier's thread, could not write there
            buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        # Who had this memory before may still be computing with it.
        self._places = [_Place(buffer, free=copier.mark()) for buffer in buffers]
        self._follower = dict(pairwise([*layers, *layers[:1]]))
        self._last: Layer | None = None
        self._at_rest: list[nn.Parameter | None] = []

    @contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """Within it `module`, if it is one of the layers, has its parameters on the device."""
        self.enter(module)
        try:
            yield
        finally:
            self.leave(module)

    def enter(self, module: nn.Module) -> None:
        """Put the parameters of `module` on the device, and let those of the next be fetched."""
        layer = self._layers.get(module)
        if layer is None:
            return
        place = self._fetch(layer)
        self._arrived(place)
        self._at_rest = [one.owner._parameters[one.name] for one in layer.fields]
        bind(layer.fields, place.buffer)
        if self._last is not None:
            self._follower[self._last] = layer
        self._last = layer
        if len(self._places) > 1:
            self._fetch(self._follower[layer], beside=place)

    def leave(self, module: nn.Module) -> None:
        """Take them away again, if they came; their place is free once all that was computed with it is done."""
        layer = self._layers.get(module)
        if layer is None or not self._at_rest:
            return
        for one, parameter in zip(layer.fields, self._at_rest, strict=True):
            one.owner._parameters[one.name] = parameter
        self._at_rest = []
        place = next(place for place in self._places if place.holds is layer)
        place.free = self._copier.mark()

    def _fetch(self, layer: Layer, beside: _Place | None = None) -> _Place:
        """The place that holds `layer`, where it may still be on its way; else it starts for the longest unused."""
        place = next((place for place in self._places if place.holds is layer), None)
        if place is None:
            place = next(place for place in self._places if place is not beside)
            if place.ticket is not None:
                with suppress(Exception):  # it was not needed after all; if it is, it is fetched again and raises then
                    self._arrived(place)
            place.holds = layer
            place.ticket = self._copier.start(place.buffer[: layer.size], layer.source, place.free)
        self._places.remove(place)
        self._places.append(place)
        return place

    def _arrived(self, place: _Place) -> None:
        """Let the computation wait for what is on its way to `place`."""
        ticket, place.ticket = place.ticket, None
        if ticket is None:
            return
        try:
            self._copier.wait(ticket)
        except BaseException:
            place.holds = None
            raise
