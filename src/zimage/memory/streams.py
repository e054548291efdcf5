"""Streams of a card for one use each: copies, work beside steps, recordings.

torch gives out the same few again and again. What is launched on a stream while another thread records on it would be
recorded and not done. Knows nothing of what a stream is for.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakValueDictionary

import torch

POOL = 32
"""Streams that torch has for a card before it begins anew (`CUDAStream.cpp`)."""

_taken: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Those that were given out, for as long as somebody has them, by what CUDA knows them by."""
_guard = threading.Lock()


def own_stream(device: torch.device | int) -> torch.cuda.Stream:
    """A stream of `device` that nobody else got here and still has, as long as there is one."""
    with _guard:
        for _ in range(POOL):
            stream = torch.cuda.Stream(device)
            if stream.cuda_stream not in _taken:
                break
        _taken[stream.cuda_stream] = stream
        return stream
