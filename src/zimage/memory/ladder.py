"""What happens when memory runs out all the same: what was being computed is done again on a lower rung.

Knows which errors mean that, and how to try again; not what a rung is (`planner`) nor how it is taken (`residency`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import count
from typing import Any, Protocol, TypeVar

import torch

Value = TypeVar("Value")

_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""In the messages of plain `RuntimeError`s by which CUDA's libraries, MPS and the allocator of the CPU say it."""


class Attempt(Protocol):
    """Computes something, again if it must."""

    def __call__(self, compute: Callable[[], Value]) -> Value: ...


def once(compute: Callable[[], Value]) -> Value:
    """The attempt that is the only one."""
    return compute()


def with_less(
    compute: Callable[[], Value], step_down: Callable[[str], Any], let_go: Callable[[], Any] | None = None
) -> Value:
    """What `compute` gives. Where memory runs out it is computed again: first after letting go of all that nobody uses,
    then after `step_down`, told how memory ran out, until that ends it by raising. `let_go` comes before either.
    """
    for tries in count():
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error) or type(error).__name__
        if let_go is not None:
            let_go()
        release()
        if tries:
            step_down(reason.splitlines()[0])
    raise AssertionError("counting ends")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a device or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def release() -> None:
    """Let go of what nobody uses: what hangs in cycles, and what torch keeps, on the device and page-locked."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        empty_host_cache = getattr(torch._C, "_host_emptyCache", None)  # which no public name does in every version
        if empty_host_cache is not None:
            empty_host_cache()
