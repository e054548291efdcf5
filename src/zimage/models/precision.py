"""Which floating-point type a model runs in, and how float16 is kept from overflowing. Knows no model.

float16 ends at 65504 and the feed-forward activations of Z-Image reach beyond (ComfyUI#12176 and others report the
black images that follow). Here the residual stream stays in float32 and what grows large is scaled by a power of two
before the normalisation that removes any scale, so nothing is clamped and nothing is lost but underflow near zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import NonFiniteError, RequestError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The precisions that a pipeline runs in, by the names that users write."""

HALF_SCALE = 2.0**-8
"""Scale of large float16 intermediates: room up to 1.6e7, and full precision down to 0.016."""


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The precision that `dtype` means on `device`.

    "auto" is bfloat16 where the device computes in it natively, float16 on older CUDA cards and on MPS, and on a CPU
    without bfloat16 instructions float32. Raises `RequestError` for anything that is not a precision of `DTYPES`.
    """
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise RequestError(f"dtype must be 'auto', {', '.join(map(repr, DTYPES))} or their torch dtype, got {dtype!r}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    return torch.float16 if device.type == "mps" else torch.float32


def cast(module: nn.Module, *, dtype: torch.dtype, device: torch.device | None = None) -> None:
    """Convert and move the weights of `module` in place. Buffers are tables that were computed (the frequencies of a
    rotary embedding): they move and keep their type, as when a checkpoint is loaded in `dtype`."""
    tables = {(owner, name): table for owner in module.modules() for name, table in owner.named_buffers(recurse=False)}
    nn.Module.to(module, device=device, dtype=dtype)  # diffusers' own `to` logs a warning
    for (owner, name), table in tables.items():
        owner._buffers[name] = table.to(device)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AVX-512 BF16 or AMX): emulated, float32 is faster."""
    return any(
        probe()
        for probe in (
            getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False),
            getattr(torch.cpu, "_is_amx_tile_supported", lambda: False),
        )
    )


def residual_dtype(compute: torch.dtype) -> torch.dtype:
    """The type of the residual stream for blocks that compute in `compute`."""
    return torch.float32 if compute == torch.float16 else compute


def overflow_scale(compute: torch.dtype) -> float:
    """The power of two by which large intermediates are scaled in `compute`; 1 where its range needs none."""
    return HALF_SCALE if compute == torch.float16 else 1.0


class Float32Math(TorchFunctionMode):
    """Within it, torch computes in float32 whatever the weights are stored in: a second try after an overflow.

    Each operation sees its half-precision arguments widened, one at a time, so no second copy of a model is needed;
    conversions to half precision are skipped, and what is written in place keeps its type. Holds no state and acts
    on the calling thread only.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS or getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        if func in _CASTS:
            result = func(*args, **kwargs)
            is_new = result is not args[0]  # and may be written to without changing what it was made of
            return args[0].to(result.device, torch.float32, copy=is_new) if result.dtype in _HALF else result
        if _writes_in_place(func):
            return func(args[0], *_widened(args[1:]), **_widened(kwargs))
        return func(*_widened(args), **_widened(kwargs))


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; reads one value back from the device.

    The sum is finite only if all are: cheaper than looking at each. Values whose sum passes float32's range fail too.
    """
    return math.isfinite(tensor.sum(dtype=torch.float32).item())


def finite(compute: Callable[[], Tensor], what: str) -> Tensor:
    """The tensor that `compute` gives, computed again in float32 if it was not finite.

    Raises `NonFiniteError`, naming `what`, if that is not finite either.
    """
    result = compute()
    if is_finite(result):
        return result
    with Float32Math():
        result = compute()
    if is_finite(result):
        return result
    raise non_finite(what)


def non_finite(what: str) -> NonFiniteError:
    """The error for `what` that is not finite even in float32."""
    return NonFiniteError(
        f"{what} gave NaN or infinity, and again when computed in float32; no picture was made. "
        "The weights are most likely damaged, or an adapter is too strong: run `zimage inspect` on the checkpoint"
    )


_HALF = (torch.float16, torch.bfloat16)
_CASTS = (Tensor.to, Tensor.type_as, Tensor.half, Tensor.bfloat16)
_READS = (Tensor.size, Tensor.stride, Tensor.data_ptr, Tensor.dim, Tensor.numel, Tensor.is_floating_point)


def _writes_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _HALF else value
    if type(value) in (tuple, list):
        return type(value)(_widened(item) for item in value)
    if type(value) is dict:
        return {name: _widened(item) for name, item in value.items()}
    return value
