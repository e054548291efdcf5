"""Whose turn it is to compute: pipelines that share a module take turns at it, as the threads of one pipeline do.

A module belongs to one pipeline or to several, and while one computes it may be changed: adapters act, layers come and
go. Knows modules only by who they are.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from typing import Any

from torch import nn

_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_FINDING = threading.Lock()


class Turn:
    """The turn at some modules, for one thread at a time; within it, it may be taken again."""

    def __init__(self, *modules: nn.Module) -> None:
        with _FINDING:
            locks = [_LOCKS.setdefault(module, threading.RLock()) for module in modules]
        self._locks = sorted(locks, key=id)  # one order for all, so that no two wait for each other

    def __enter__(self) -> None:
        with ExitStack() as taken:
            for lock in self._locks:
                taken.enter_context(lock)
            taken.pop_all()

    def __exit__(self, *_: object) -> None:
        for lock in reversed(self._locks):
            lock.release()
