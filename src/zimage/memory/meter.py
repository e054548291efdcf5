"""Counts the memory of tensors as operations make and drop them, and can enforce a capacity: a device in miniature.

Sees every storage that an operation returns, not the workspace inside one. Works on any device, also on `meta`, where
nothing is computed. Knows no models.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class AllocationMeter(TorchDispatchMode):
    """Within it, `live` counts the bytes of tensors that operations made, `peak` the most there were.

    Args:
        capacity: bytes; an operation whose result would not fit raises `torch.OutOfMemoryError`, as a device does.
        fail_at: raise that error at this allocation (1 for the first), whatever the capacity.
        device: count only what is there: "cpu", "meta"; by default everywhere.

    `adopt` counts tensors that were there before. Acts on the calling thread.
    """

    def __init__(self, capacity: int | None = None, *, fail_at: int | None = None, device: str | None = None) -> None:
        super().__init__()
        self._device = device
        self.capacity, self.fail_at = capacity, fail_at
        self.live = self.peak = self.allocations = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of `tensors` too, until it is dropped."""
        for tensor in tensors:
            self._count(tensor.untyped_storage())

    def reset_peak(self) -> None:
        """Let `peak` begin again at what is live."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in _dense((result,)):
            storage = made.untyped_storage()
            if storage._cdata not in self._storages and not _is_of(storage, args, kwargs):
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or not size or self._device not in (None, storage.device.type):
            return
        self.allocations += 1
        if self.allocations == self.fail_at or (self.capacity is not None and self.live + size > self.capacity):
            raise torch.OutOfMemoryError(f"{size} bytes are wanted, {self.live} of {self.capacity} are in use")
        self.live += size
        self.peak = max(self.peak, self.live)

        def dropped(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, dropped)


def _is_of(storage: torch.UntypedStorage, args: Any, kwargs: Any) -> bool:
    given = (*args, *kwargs.values()) if kwargs else args
    return any(one.untyped_storage()._cdata == storage._cdata for one in _dense(given))


def _dense(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors of an operation's arguments or results, which are lists and tuples of them at most."""
    for value in values:
        if isinstance(value, Tensor):
            if value.layout == torch.strided:
                yield value
        elif isinstance(value, list | tuple):
            yield from _dense(value)
