"""Softmax attention of queries, keys and values in float8, blocks of keys added up in float32.

Launched as those of `fused` are, and with its rules: `None` where a kernel was not written for what is given. Queries
and keys come from `fused.rotate_normalized`. Imported at the first use; importing it needs Triton.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import fused, heads

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

CARD = (9, 0)
"""Compute capability that this was written and measured for, Hopper's. For those before, which copy no blocks by
themselves, Triton makes a far slower program of it."""
SIZES = (32, 64, 128)
"""Channels of a head: the least that an 8-bit product takes, and the most that registers hold."""
ROWS, COLUMNS = 64, 128
"""Queries of a program, and keys that it takes at a time: three programs fit into a multiprocessor of an H200, and one
multiplies while another takes powers."""
VALUE_ROWS, VALUE_COLUMNS = 512, 32
"""The tile of a program that rounds values: all tokens of these channels, so many at a time."""
GROUP = 16
"""Rounded values have room for a multiple of so many tokens."""


@fused._overridable
def takes(value: Tensor) -> bool:
    """Whether `attend` computes attention of such values (B, N, heads, head_dim), and of queries and keys of their
    shape."""
    if TensorDescriptor is None or value.ndim != 4 or not value.numel() or not value.is_contiguous():
        return False
    if value.dtype not in (torch.bfloat16, torch.float16) or value.shape[3] not in SIZES:
        return False
    if max(value.shape[0], value.shape[2]) > fused.MOST_BATCHES:
        return False
    return not value.is_cuda or torch.cuda.get_device_capability(value.device) == CARD


@fused._overridable
def attend(query: Tensor, query_scale: Tensor, key: Tensor, key_scale: Tensor, value: Tensor) -> Tensor | None:
    """`query` and `key` (B, N, heads, head_dim) in float8 e4m3, times their scales (1,), and `value` of their shape in
    half precision, which is rounded here, every channel with a scale of its own: attention in the type of `value`."""
    if not takes(value) or query.shape != value.shape or key.shape != value.shape:
        return None
    if query.dtype != torch.float8_e4m3fn or query.dtype != key.dtype:
        return None
    given = (query, query_scale, key, key_scale)
    if any(one.device != value.device or not one.is_contiguous() for one in given):
        return None
    batch, tokens, count, size = query.shape
    width, groups = count * size, -(-tokens // GROUP)
    values = torch.empty((batch, width, groups * GROUP), dtype=query.dtype, device=query.device)
    scales = torch.empty((batch, width), device=query.device)
    fused._launch(
        heads.narrow_values, (-(-width // VALUE_COLUMNS), batch), value, values, scales, tokens, groups,
        width=width, rows=VALUE_ROWS, columns=VALUE_COLUMNS, num_warps=16,
    )  # fmt: skip
    result = torch.empty_like(value)
    keys = TensorDescriptor.from_tensor(key.view(batch * tokens, width), [COLUMNS, size])
    rounded = TensorDescriptor.from_tensor(values.view(batch * width, groups * GROUP), [size, COLUMNS])
    fused._launch(
        heads.attend_heads, (-(-tokens // ROWS), count, batch), query, keys, rounded, query_scale, key_scale,
        scales, result, tokens, size**-0.5 / math.log(2.0),
        heads=count, size=size, rows=ROWS, columns=COLUMNS, num_warps=4,
    )  # fmt: skip
    return result
