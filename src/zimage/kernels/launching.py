"""Starts Triton's kernels, from the second time on without Triton's own preparation.

Triton looks at every argument and composes all that a kernel was compiled for, at each call, while a small picture
waits for the host alone. What that can depend on here is compared directly: constants, types, which tensors are absent
or start at no multiple of 16 bytes, and the device. Integers are never compiled in (each kernel says so). Knows no
kernel; importing it needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

ALIGNED = 16
"""Bytes; Triton compiles a kernel with wide loads where a tensor starts at a multiple of it."""
WIDE = 2**31
"""Integers from here on are passed in 64 bits, to a kernel of its own."""

_TAKES_CONSTANTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
"""Whether what Triton compiled is called with the constants too."""

_ready: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""What Triton compiled, and the constants in the order of the kernel's parameters, by all that they were made for."""


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **constants: Any) -> None:
    """Start `kernel` with the tensors and numbers that it is called with, and the constants that it is compiled for, on
    the device of `first` and in its current stream; nothing waits for it. Sums of products are not contracted."""
    with torch.cuda.device_of(first):
        if not first.is_cuda:
            kernel[grid](first, *args, **constants, enable_fp_fusion=False)
            return
        key = (kernel, first.device, *constants.values(), *map(_kind, args), _kind(first))
        known = _ready.get(key)
        if known is None:
            compiled = kernel[grid](first, *args, **constants, enable_fp_fusion=False)
            names = kernel.arg_names[len(args) + 1 :]
            _ready[key] = compiled, tuple(constants[name] for name in names if _TAKES_CONSTANTS)
        else:
            compiled, values = known
            compiled[(*grid, 1, 1)[:3]](first, *args, *values)


def _kind(value: Any) -> Any:
    """All of an argument that Triton compiles for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % ALIGNED == 0
    if isinstance(value, int):
        return -WIDE <= value < WIDE
    if hasattr(value, "block_shape"):  # a tensor described as blocks
        return value.base.dtype, *value.block_shape
    return None if value is None else float
