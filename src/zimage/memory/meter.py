"""Counts the memory of tensors as operations make and drop them, and can enforce a capacity: a device in miniature.

Sees every storage that an operation returns, not the workspace inside one. Works on any device, also on `meta`, where
nothing is computed. Knows no models.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
        kwargs = kwargs or {}
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _is_dense(leaf)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if _is_dense(leaf) and (storage := leaf.untyped_storage())._cdata not in given:
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


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided
