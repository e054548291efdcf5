"""The kernels as functions of tensors: what they are launched with, and whether they apply.

Each function gives `None` where shapes, types or strides are none that its kernel was written for; whoever calls has
the plain expression. Each goes through torch's override protocol, so that a mode such as `Float32Math` sees it as any
function of torch. Nothing is tuned by measuring: launch parameters follow from the width of a row, so bits repeat.
Imported at the first use; importing it needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import groups, launching, rows
from . import heads as of_heads

TYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 4096
"""Elements that a program has in its registers, 16 for each of its threads: one row of the released models' 3840."""
WIDEST = 16384
"""Elements of the longest row that a program takes at once."""
MOST_PARTS = 512
"""Parts of a picture whose statistics are gathered side by side: a few for each processor of the largest cards."""
MOST_BATCHES = 65535
"""The second axis of a launch ends there."""
GATE_BLOCK = 2048
"""Elements of a program without sums: two loads of 16 bytes from each source and thread, in half precision."""
FLOAT8_MOST = 448.0
"""The largest number of float8 e4m3."""
FLOAT8_CARDS = (8, 9)
"""Compute capability from which on cards convert float8 e4m3."""

_launch = launching.launch
Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")


def _overridable(function: Callable[Parameters, Value]) -> Callable[Parameters, Value]:
    """`function`, handed to the mode that is active or the tensor type that wants it, as torch's functions are."""

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Value:
        if has_torch_function(args):
            return handle_torch_function(call, args, *args, **kwargs)
        return function(*args, **kwargs)

    return call


Rounded = tuple[Tensor, Tensor, torch.dtype]
"""Rows in 8 bits, the scale of each in float32, and the type that they were rounded from."""


@_overridable
def normalize(
    hidden: Tensor, weight: Tensor, factor: Tensor | None, eps: float, narrow: torch.dtype | None = None
) -> Tensor | Rounded | None:
    """RMS norm of rows of `hidden` (..., width) in the weight's type, times `factor` (B or 1, 1, width) if given; then
    rounded to `narrow`, int8 or float8 e4m3, if that is given."""
    shape = _shape(hidden, factor)
    if shape is None or not _fit(hidden, shape[2], weight, factor) or not _converts(hidden, narrow):
        return None
    result, scales = _rows_like(hidden, weight.dtype, narrow)
    count, columns = _tile(shape[2])
    _launch(
        rows.normalize_rows, (-(-shape[1] // count), shape[0]), hidden, weight, factor, result, scales, shape[1], eps,
        batched=_batched(factor), width=shape[2], rows=count, columns=columns, num_warps=_warps(columns),
    )  # fmt: skip
    return result if scales is None else (result, scales, weight.dtype)


@_overridable
def add_normalized(tokens: Tensor, update: Tensor, weight: Tensor, gate: Tensor | None, eps: float) -> Tensor | None:
    """`tokens` (B, N, width) plus `normalize(update, weight, gate, eps)`, in the type of `tokens`."""
    added = _add(tokens, update, weight, gate, eps)
    return None if added is None else added[0]


@_overridable
def add_then_normalize(
    tokens: Tensor,
    update: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    next_weight: Tensor,
    next_factor: Tensor | None,
    next_eps: float,
    narrow: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | Rounded] | None:
    """What `add_normalized` gives, without a `weight` `tokens + update`, and the norm of that with the `next_` weight,
    factor and eps, rounded to `narrow` if that is given."""
    added = _add(tokens, update, weight, gate, eps, next_weight, next_factor, next_eps, narrow)
    return added if added is None or narrow is None else (added[0], (*added[1:], next_weight.dtype))


def _add(
    tokens: Tensor,
    update: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    next_weight: Tensor | None = None,
    next_factor: Tensor | None = None,
    next_eps: float = 0.0,
    narrow: torch.dtype | None = None,
) -> Any:
    shape = _shape(update, gate, next_factor)
    if shape is None or tokens.shape != update.shape or not _fit(tokens, shape[2]):
        return None
    added = update if weight is None else weight
    if not _fit(update, shape[2], weight, gate) or torch.promote_types(tokens.dtype, added.dtype) != tokens.dtype:
        return None
    if next_weight is not None and not _fit(tokens, shape[2], next_weight, next_factor):
        return None
    if not _converts(tokens, narrow):
        return None
    result, following, scales = torch.empty_like(tokens), None, None
    if next_weight is not None:
        following, scales = _rows_like(tokens, next_weight.dtype, narrow)
    count, columns = _tile(shape[2])
    _launch(
        rows.add_rows, (-(-shape[1] // count), shape[0]), tokens, update, weight, gate, result,
        next_weight, next_factor, following, scales, shape[1], eps, next_eps,
        batched=_batched(gate), next_batched=_batched(next_factor),
        width=shape[2], rows=count, columns=columns, num_warps=_warps(columns),
    )  # fmt: skip
    return (result, following) if narrow is None else (result, following, scales)


@_overridable
def rotate_normalized(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    rotations: Tensor,
    query_eps: float,
    key_eps: float,
    halves: bool = False,
    narrow: torch.dtype | None = None,
) -> tuple[Tensor, Tensor] | tuple[Rounded, Rounded] | None:
    """RMS norm of every head of `query` and `key` (B, N, heads, head_dim), then pairs of channels turned by `rotations`
    (1 or B, N, head_dim / 2), complex64: neighbours, with `halves` channels i and i + head_dim / 2. Both may be views
    of one tensor, with channels side by side; keys may have fewer heads. With `narrow`, float8 e4m3, both come so, with
    one scale each that follows from the weights."""
    if query.ndim != 4 or key.ndim != 4 or query.dtype != key.dtype or query_weight.dtype != key_weight.dtype:
        return None
    batch, tokens, heads, size = query.shape
    if (batch, tokens, size) != (*key.shape[:2], key.shape[3]) or key.shape[2] > heads:
        return None
    if (halves and size != _power_of_two(size)) or not _converts(query, narrow):
        return None
    if not (_fit_heads(query, query_weight) and _fit_heads(key, key_weight)):
        return None
    if rotations.dtype != torch.complex64 or rotations.shape[1:] != (tokens, size // 2):
        return None
    if len(rotations) not in (1, batch):
        return None
    if rotations.stride(2) != 1 or rotations.is_conj() or rotations.device != query.device:
        return None
    strides = (*query.stride()[:3], *key.stride()[:3])
    step = 16 if not any(stride % 16 for stride in strides) else 1
    turns = torch.view_as_real(rotations)
    dtype, device = query_weight.dtype, query.device
    results = [torch.empty(one.shape, dtype=narrow or dtype, device=device) for one in (query, key)]
    scales = [torch.empty(1, device=device) for _ in results] if narrow else (None, None)
    places, columns = _power_of_two(heads), _power_of_two(size)
    count = max(1, TILE // (places * columns))
    _launch(
        of_heads.rotate_heads, (-(-tokens // count), batch), query, key, query_weight, key_weight, turns, *results,
        *scales, tokens, *(stride // step for stride in strides), turns.stride(0) if len(rotations) > 1 else 0,
        turns.stride(1), query_eps, key_eps, step=step, heads=heads, key_heads=key.shape[2], size=size, count=count,
        places=places, columns=columns, halves=halves, reach=size**0.5 / FLOAT8_MOST,
        num_warps=_warps(count * places * columns),
    )  # fmt: skip
    if scales[0] is None or scales[1] is None:
        return results[0], results[1]
    return (results[0], scales[0], dtype), (results[1], scales[1], dtype)


@_overridable
def gate(
    opening: Tensor, content: Tensor, scale: float, in_place: bool, narrow: torch.dtype | None = None
) -> Tensor | Rounded | None:
    """`silu(opening) * (content * scale)` of two tensors of one shape; written over `opening` if `in_place`; its rows
    rounded to `narrow` instead, if that is given."""
    if opening.shape != content.shape or opening.dtype != content.dtype or not opening.numel():
        return None
    if opening.dtype not in TYPES or opening.device != content.device:
        return None
    if not (opening.is_contiguous() and content.is_contiguous()):
        return None
    if narrow is not None:
        return _gate_rows(opening, content, scale, narrow)
    result = opening if in_place else torch.empty_like(opening)
    length = opening.numel()
    _launch(
        rows.gate_elements, (-(-length // GATE_BLOCK),), opening, content, result, length,
        scale=scale, is_whole=length % GATE_BLOCK == 0, block=GATE_BLOCK, num_warps=4,
    )  # fmt: skip
    return result


def _gate_rows(opening: Tensor, content: Tensor, scale: float, narrow: torch.dtype) -> Rounded | None:
    width = opening.shape[-1]
    if width > WIDEST or not _converts(opening, narrow):
        return None
    head = 1 << (width.bit_length() - 1)
    tail = _power_of_two(width - head) if width > head else 0
    result, scales = _rows_like(opening, opening.dtype, narrow)
    _launch(
        rows.gate_rows, (opening.numel() // width,), opening, content, result, scales,
        scale=scale, width=width, head=head, tail=tail, num_warps=_warps(head + tail),
    )  # fmt: skip
    assert scales is not None
    return result, scales, opening.dtype


@_overridable
def activate_groups(
    hidden: Tensor, weight: Tensor, bias: Tensor, count: int, eps: float, added: Tensor | None = None
) -> Tensor | None:
    """SiLU of the group norm of `hidden` (B, C, H, W), channels last, in `count` groups; `added` (C,) is added to
    `hidden` before, rounded to its type."""
    if not _is_picture(hidden) or not all(_is_channels(one, hidden) for one in (weight, bias, added)):
        return None
    if added is not None and added.dtype != hidden.dtype:
        return None
    batch, channels, height, width = hidden.shape
    if channels != _power_of_two(channels) or channels > TILE or channels % count or batch > MOST_BATCHES:
        return None
    pixels, size, tile = height * width, channels // count, TILE // channels
    tiles = -(-pixels // (tile * MOST_PARTS))
    parts = -(-pixels // (tile * tiles))
    numbers = torch.zeros(batch, 2 * count * (size + 1 + parts), device=hidden.device)
    result = torch.empty_like(hidden)
    _launch(
        groups.gather_groups, (parts, batch), hidden, added, weight, bias, numbers, pixels, tiles, tile * tiles, eps,
        groups=count, size=size, rows=tile, num_warps=8,
    )  # fmt: skip
    _launch(
        groups.activate_groups, (-(-pixels // tile), batch), hidden, added, numbers, result, pixels, parts,
        groups=count, size=size, rows=tile, num_warps=8,
    )  # fmt: skip
    return result


def _is_picture(hidden: Tensor) -> bool:
    """Whether `hidden` is (B, C, H, W) with channels side by side."""
    if hidden.ndim != 4 or not hidden.numel() or hidden.dtype not in TYPES:
        return False
    return hidden.is_contiguous(memory_format=torch.channels_last)


def _is_channels(row: Tensor | None, picture: Tensor) -> bool:
    """Whether `row` (C,), if there is one, has a number for each channel of `picture`."""
    if row is None:
        return True
    fits = row.shape == picture.shape[1:2] and row.is_contiguous()
    return fits and row.dtype in TYPES and row.device == picture.device


def _shape(hidden: Tensor, *factors: Tensor | None) -> tuple[int, int, int] | None:
    """(batch, tokens, width) by which `factors` (B or 1, 1, width) are told apart; without them, rows of one batch."""
    if not hidden.numel() or not hidden.ndim:
        return None
    shape = hidden.shape
    width = shape[-1]
    given = [factor.shape for factor in factors if factor is not None]
    if not given:
        return 1, hidden.numel() // width, width
    if len(shape) != 3 or shape[0] > MOST_BATCHES:
        return None
    for one in given:
        if one != (1, 1, width) and one != (shape[0], 1, width):
            return None
    return shape[0], shape[1], width


def _fit(hidden: Tensor, width: int, weight: Tensor | None = None, factor: Tensor | None = None) -> bool:
    """Whether rows of `hidden`, a norm's `weight` and a `factor` of its type lie dense on one device."""
    device = hidden.device
    for one in (hidden, weight, factor):
        if one is not None and (one.dtype not in TYPES or not one.is_contiguous() or one.device != device):
            return False
    if weight is not None and (weight.shape != (width,) or (factor is not None and factor.dtype != weight.dtype)):
        return False
    return width <= WIDEST


def _fit_heads(heads: Tensor, weight: Tensor) -> bool:
    """Whether channels of `heads` (B, N, heads, head_dim) lie side by side and make pairs, and `weight` is theirs."""
    if not heads.numel() or heads.stride(3) != 1 or heads.shape[3] % 2 or heads.shape[0] > MOST_BATCHES:
        return False
    if _power_of_two(heads.shape[2]) * _power_of_two(heads.shape[3]) > WIDEST:
        return False
    return heads.dtype in TYPES and _fit(weight, heads.shape[3], weight) and weight.device == heads.device


def _converts(hidden: Tensor, narrow: torch.dtype | None) -> bool:
    """Whether the card of `hidden` can round to `narrow`."""
    if narrow is None or not hidden.is_cuda or narrow != torch.float8_e4m3fn:
        return True
    return torch.cuda.get_device_capability(hidden.device) >= FLOAT8_CARDS


def _rows_like(hidden: Tensor, dtype: torch.dtype, narrow: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Room for as many rows in `dtype`, or for those in `narrow` and their scales (..., 1)."""
    result = torch.empty(hidden.shape, dtype=narrow or dtype, device=hidden.device)
    if narrow is None:
        return result, None
    return result, torch.empty((*hidden.shape[:-1], 1), dtype=torch.float32, device=hidden.device)


def _batched(factor: Tensor | None) -> bool:
    return factor is not None and factor.shape[0] > 1


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program, which has one row or a few short ones."""
    columns = _power_of_two(width)
    return max(1, TILE // columns), columns


def _warps(elements: int) -> int:
    """Warps of a program: 16 elements for each thread, or more where that would be too many threads."""
    return 8 if elements <= TILE else 16


def _power_of_two(number: int) -> int:
    """The first that is not below `number`: Triton's blocks have such sizes."""
    return 1 << (number - 1).bit_length()
