"""Brings a layer's bytes into its place on the device: from files or from the host's memory, beside the computation.

A source is a function that writes a layer into a flat buffer on the host, or a tensor there that holds it. Knows no
layers and no order: `ring` decides what comes when.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .ring import page_locked
from .streams import own_stream

Source = Tensor | Callable[[Tensor], None]


class HostCopier:
    """For a device that is the host: a thread reads the next layer while the current one computes."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="zimage-weights")

    def start(self, place: Tensor, source: Source, free: Any) -> Future[None]:
        # What was computed with the place is done when it is marked: on the host nothing runs ahead.
        return self._thread.submit(_fill, place, source)

    def wait(self, ticket: Future[None]) -> None:
        ticket.result()

    def mark(self) -> None:
        return None


class CudaCopier:
    """For a CUDA device: copies run on a stream of their own, and streams wait for events, the host for nothing.

    Where a source reads files, a thread does, into one page-locked buffer, whose copy is awaited before it is used
    again.
    """

    def __init__(self, device: torch.device, largest: int) -> None:
        self._device = device
        self._stream = own_stream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="zimage-weights")
        self._largest = largest
        self._staging: Tensor | None = None
        self._staged: torch.cuda.Event | None = None

    def start(self, place: Tensor, source: Source, free: torch.cuda.Event) -> Any:
        if isinstance(source, Tensor):
            return self._copy(place, source, free)
        return self._thread.submit(self._read_and_copy, place, source, free)

    def wait(self, ticket: Any) -> None:
        event = ticket.result() if isinstance(ticket, Future) else ticket
        torch.cuda.current_stream(self._device).wait_event(event)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _copy(self, place: Tensor, host: Tensor, free: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            place.copy_(host, non_blocking=True)
            place.record_stream(self._stream)  # whoever lets go of it does not wait for this
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def _read_and_copy(
        self, place: Tensor, source: Callable[[Tensor], None], free: torch.cuda.Event
    ) -> torch.cuda.Event:
        if self._staging is None:
            self._staging = page_locked(self._largest)
        if self._staged is not None:
            self._staged.synchronize()
        host = self._staging[: len(place)]
        source(host)
        self._staged = self._copy(place, host, free)
        return self._staged


def _fill(place: Tensor, source: Source) -> None:
    if isinstance(source, Tensor):
        place.copy_(source)
    else:
        source(place)
