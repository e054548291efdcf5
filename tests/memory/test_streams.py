"""Streams for one use each, of a pool that torch gives out in turn."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from zimage.memory import streams


class Stream:
    """One of three, whichever is next."""

    turns = cycle([10, 11, 12])

    def __init__(self, device: int) -> None:
        self.device, self.cuda_stream = device, next(self.turns)


def test_nobody_gets_what_another_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    kept = streams.own_stream(1)
    assert (kept.device, kept.cuda_stream) == (1, 10)
    assert [streams.own_stream(1).cuda_stream for _ in range(4)] == [11, 12, 11, 12]  # each let go of at once
    others = [streams.own_stream(1), streams.own_stream(1)]
    assert {kept.cuda_stream, *(one.cuda_stream for one in others)} == {10, 11, 12}
    assert streams.own_stream(1).cuda_stream in (10, 11, 12)  # rather than none
