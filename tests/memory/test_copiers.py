"""Copies to a card on a stream of their own: what they wait for, and what waits for them.

Stand-ins take the part of CUDA's streams; tests/gpu streams layers through a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage.memory.copiers import CudaCopier


class Place(Tensor):
    """Memory of a card: notes the streams that its memory must not be used again before."""

    streams: list[Any]

    def record_stream(self, stream: Any) -> None:
        self.streams.append(stream)


class Stream:
    """Notes what it is told to wait for, and the events that follow."""

    cuda_stream = 1

    def __init__(self, _: Any = None) -> None:
        self.asked: list[tuple[str, Any]] = []

    def wait_event(self, event: Any) -> None:
        self.asked.append(("wait", event))


class Event:
    def record(self, stream: Stream) -> None:
        stream.asked.append(("record", self))

    def synchronize(self) -> None: ...


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The stream of whoever computes."""
    made = Stream()

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made)
    return made


@pytest.mark.parametrize("source", ["memory", "file"])
def test_a_copy_has_its_place_in_time(computing: Stream, source: str) -> None:
    """After what was computed in the place, before what will be, and before its memory is anybody else's."""
    copier = CudaCopier(torch.device("cuda", 0), 8)
    copier._staging = torch.empty(8, dtype=torch.uint8)  # in place of page-locked memory
    place = torch.zeros(8, dtype=torch.uint8).as_subclass(Place)
    place.streams = []
    bytes_of = torch.arange(8, dtype=torch.uint8)
    free = copier.mark()
    ticket = copier.start(place, bytes_of if source == "memory" else lambda host: host.copy_(bytes_of), free)
    copier.wait(ticket)
    event = ticket.result() if isinstance(ticket, Future) else ticket
    own: Any = copier._stream
    assert own.asked == [("wait", free), ("record", event)]
    assert computing.asked == [("record", free), ("wait", event)]
    assert place.streams == [own]
    assert torch.equal(place.as_subclass(Tensor), bytes_of)
