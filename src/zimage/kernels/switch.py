"""Whether fused kernels are used, and what happens where they cannot be.

On CUDA they are, unless `ZIMAGE_KERNELS=off` is set or code runs within `using("off")`. Where Triton is missing or a
launch fails, a warning says why and torch computes from then on; memory that runs out is no such failure. Nothing here
imports Triton before the first use. Knows no kernel.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RequestError, ZImageWarning
from ..memory.ladder import is_out_of_memory

VARIABLE = "ZIMAGE_KERNELS"
"""Environment variable that holds one of `MODES`; read once."""
MODES = ("auto", "off", "on")
"""On CUDA where they work; never; always, and what fails is raised (on a CPU, Triton's interpreter can run them)."""


def _checked(mode: str, name: str) -> str:
    if mode not in MODES:
        raise RequestError(f"{name} must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


_default = _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)
_mode = ContextVar("mode", default=_default)
_PLAIN = (Tensor, nn.Parameter)
"""Kinds of tensors that a kernel may read, if they want no gradients; others are a compiler's and the like."""
_failures: list[str] = []
"""Why kernels are not used any more in this process; at most one."""
_guard = threading.Lock()


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Within it, on this thread, kernels are used as one of `MODES` says, whatever the environment does."""
    token = _mode.set(_checked(mode, "the mode of the kernels"))
    try:
        yield
    finally:
        _mode.reset(token)


def mode() -> str:
    """Which of `MODES` holds here."""
    return _mode.get()


def wanted(tensor: Tensor) -> bool:
    """Whether to ask `run` at all; cheap. A compiler fuses the plain expression by itself."""
    return not torch.compiler.is_compiling() and (tensor.is_cuda or _mode.get() == "on")


def used(device: torch.device) -> bool:
    """Whether kernels are used on `device`, as far as is known."""
    mode = _mode.get()
    return mode == "on" or (mode == "auto" and device.type == "cuda" and not _failures)


def usable(*args: Any) -> bool:
    """Whether `run` would try a kernel with these."""
    mode = _mode.get()
    if mode == "off" or (_failures and mode != "on"):
        return False
    graded = torch.is_grad_enabled()
    for value in args:
        if isinstance(value, Tensor) and (type(value) not in _PLAIN or (graded and value.requires_grad)):
            return False
    return True


def run(name: str, *args: Any) -> Any:
    """What the kernel `name` gives, one of `fused` or, as "module.name", of another module here; or `None` where the
    plain expression has to be taken."""
    if not usable(*args):
        return None
    try:
        return _kernel(name)(*args)
    except Exception as error:
        if _mode.get() == "on" or is_out_of_memory(error):
            raise
        _give_up(f"{type(error).__name__}: {error}".splitlines()[0])
        return None


def _kernel(name: str) -> Any:
    module, _, kernel = name.rpartition(".")
    place = f"{__package__}.{module or 'fused'}"
    return getattr(sys.modules.get(place) or import_module(place), kernel)


def _give_up(reason: str) -> None:
    with _guard:
        if _failures:
            return
        _failures.append(reason)
    warnings.warn(
        f"fused kernels cannot be used here, torch computes without them: {reason} "
        f"(pip install triton, and a C compiler; {VARIABLE}=off says that this is meant)",
        ZImageWarning,
        stacklevel=2,
    )
