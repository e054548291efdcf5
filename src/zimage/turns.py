"""Whose turn it is to compute: pipelines that share a module take turns at it, as the threads of one pipeline do.

A module belongs to one pipeline or to several, and while one computes it may be changed: adapters act, layers come and
go. Knows modules only by who they are.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from torch import nn

from .errors import RequestError

_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_FINDING = threading.Lock()


class Turn:
    """The turn at some modules, for one thread at a time; within it, it may be taken again."""

    def __init__(self, *modules: nn.Module) -> None:
        with _FINDING:
            locks = [_LOCKS.setdefault(module, threading.RLock()) for module in modules]
        self._locks = sorted(locks, key=id)  # one order for all, so that no two wait for each other
        self._process = os.getpid()

    def __reduce__(self) -> NoReturn:
        """Raises `RequestError`: whoever has a turn, as a pipeline does, is not pickled and not copied in depth."""
        raise RequestError(
            "a pipeline cannot be pickled, sent to another process or copied with its models; load the model there, or "
            "make another pipeline of its parts"
        )

    def to_compute(self) -> Turn:
        """Itself; raises `RequestError` in a process that was forked since, where torch would wait for its threads."""
        if os.getpid() != self._process and torch.get_num_threads() > 1:
            raise RequestError(
                "this process was forked from the one that loaded the pipeline, and torch's threads are not in it; "
                "load the model in each process, or call torch.set_num_threads(1) in this one first"
            )
        return self

    def __enter__(self) -> None:
        with ExitStack() as taken:
            for lock in self._locks:
                taken.enter_context(lock)
            taken.pop_all()

    def __exit__(self, *_: object) -> None:
        for lock in reversed(self._locks):
            lock.release()
