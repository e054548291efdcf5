"""What lies between the weights: norms, gates, rotations and activations, with few passes over memory.

On CUDA each is one fused kernel (`kernels`) where it applies. Elsewhere it is done in place where nobody else can see
the tensor in between, with the bits of the plain expression. Works on any module: one that is hooked, replaced or
unknown is called as it stands. Knows no model.
"""

from __future__ import annotations

from functools import cache
from typing import Any, overload

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from ..kernels.switch import run, wanted
from .quantized import QuantizedLinear
from .rope import rotate
from .rowwise import NARROW, Quantized, Rows, rounded

_RECORDER = "transformers.utils.output_capturing"
"""Where the hooks are made that transformers leaves on layers once their outputs were asked for, as diffusers asks;
they act only while a model around the layer is called for that."""


def is_bare(module: Any) -> bool:
    """Whether calling `module` runs its class's `forward` and nothing else: no hooks that act, no other `forward`."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    if any(hooks) and any(acts(hook) for kind in hooks for hook in kind.values()):
        return False
    return "forward" not in module.__dict__


def acts(hook: Any) -> bool:
    """Whether a hook does something by itself when its module is called."""
    return getattr(hook, "__module__", None) != _RECORDER


def row_kind(*modules: Any) -> str | None:
    """What all of `modules` round their input to, "int8" or "float8", so that it can be done once for them, by whatever
    makes that input; `None` where one of them takes it as it is, or is looked at by a hook."""
    kinds = {module.rows if type(module) is QuantizedLinear and is_bare(module) else None for module in modules}
    return kinds.pop() if len(kinds) == 1 else None


@overload
def normalize(norm: Any, hidden: Tensor, factor: Tensor | None = None) -> Tensor: ...
@overload
def normalize(norm: Any, hidden: Tensor, factor: Tensor | None, kind: str | None) -> Rows: ...
def normalize(norm: Any, hidden: Tensor, factor: Tensor | None = None, kind: str | None = None) -> Rows:
    """`norm(hidden)`, times `factor` if there is one, as rows of `kind` if that is given; `norm` is diffusers' RMSNorm
    or anything in its place.

    Formed as diffusers does: the mean square in float32 (arXiv 1910.07467, eq. 4), then in the type of the weight.
    """
    weight = _weight(norm)
    if weight is not None and wanted(hidden):
        fused = run("normalize", hidden, weight, factor, norm.eps, *_narrow(kind))
        if fused is not None:
            return _rows(fused)
    if weight is not None:
        return rounded(_normal(hidden, weight, norm.eps, factor), kind)
    normal = norm(hidden)
    return rounded(normal if factor is None else normal * factor, kind)


def add_normalized(tokens: Tensor, norm: Any, update: Tensor, gate: Tensor | None = None) -> Tensor:
    """`tokens + normalize(norm, update, gate)`."""
    if wanted(tokens):
        weight = _weight(norm)
        fused: Tensor | None = None if weight is None else run("add_normalized", tokens, update, weight, gate, norm.eps)
        if fused is not None:
            return fused
    return tokens + normalize(norm, update, gate)


def add_then_normalize(
    tokens: Tensor,
    norm: Any,
    update: Tensor,
    gate: Tensor | None,
    next_norm: Any,
    next_factor: Tensor | None,
    kind: str | None = None,
) -> tuple[Tensor, Rows]:
    """`add_normalized(tokens, norm, update, gate)`, and `normalize(next_norm, ..., next_factor, kind)` of that."""
    if wanted(tokens):
        weight, next_weight = _weight(norm), _weight(next_norm)
        if weight is not None and next_weight is not None:
            following = next_weight, next_factor, next_norm.eps, *_narrow(kind)
            fused = run("add_then_normalize", tokens, update, weight, gate, norm.eps, *following)
            if fused is not None:
                return fused[0], _rows(fused[1])
    tokens = add_normalized(tokens, norm, update, gate)
    return tokens, normalize(next_norm, tokens, next_factor, kind)


def rotate_normalized(
    query_norm: Any, key_norm: Any, query: Tensor, key: Tensor, rotations: Tensor, kind: str | None = None
) -> tuple[Rows, Rows]:
    """`query` and `key` (B, N, heads, head_dim), each head normalised if there is a norm, then turned by `rotate`; in
    `kind`, "float8", if that is given and a kernel does it, with one scale for all heads."""
    if wanted(query):
        weights = _weight(query_norm), _weight(key_norm)
        if weights[0] is not None and weights[1] is not None:
            narrow = (False, *_narrow(kind)) if kind else ()
            fused = run("rotate_normalized", query, key, *weights, rotations, query_norm.eps, key_norm.eps, *narrow)
            if fused is not None:
                return _rows(fused[0]), _rows(fused[1])
    if query_norm is not None:
        query = normalize(query_norm, query)
    if key_norm is not None:
        key = normalize(key_norm, key)
    query, key = rotate(torch.cat([query, key], dim=2), rotations).chunk(2, dim=2)
    return query, key


def gate(opening: Any, content: Any, hidden: Rows, scale: float = 1.0, kind: str | None = None) -> Rows:
    """`silu(opening(hidden)) * (content(hidden) * scale)` of two modules, as rows of `kind` if that is given."""
    opened, held = opening(hidden), content(hidden)
    in_place = is_bare(opening) and opened is not hidden
    if wanted(opened):
        fused = run("gate", opened, held, scale, in_place, *_narrow(kind))
        if fused is not None:
            return _rows(fused)
    return rounded(F.silu(opened, inplace=in_place).mul_(held if scale == 1.0 else held * scale), kind)


def activate(module: Any, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
    """`silu(module(hidden + bias))` of a picture (B, C, H, W) and a bias (C,), if there is one, which may be added in
    place; of a group norm, fused where that applies."""
    if type(module) is nn.GroupNorm and wanted(hidden) and module.affine and is_bare(module):
        norm = module.weight, module.bias, module.num_groups, module.eps
        fused: Tensor | None = run("activate_groups", hidden, *norm, bias)
        if fused is not None:
            return fused
    if bias is not None:
        hidden = hidden.add_(bias[:, None, None])
    result = module(hidden)
    return F.silu(result, inplace=is_bare(module) and result is not hidden)


def _normal(hidden: Tensor, weight: Tensor, eps: float, factor: Tensor | None) -> Tensor:
    wide = hidden.float()
    normal = wide * _inverse_root_mean_square(wide, eps)
    if normal.dtype != weight.dtype:
        normal = normal.to(weight.dtype)
    normal.mul_(weight)
    if factor is None:
        return normal
    return normal.mul_(factor) if factor.dtype == normal.dtype else normal * factor


def _inverse_root_mean_square(wide: Tensor, eps: float) -> Tensor:
    """`rsqrt(mean(wide²) + eps)` of the last axis, which stays, of size 1.

    On a CPU in fewer and shorter operations with the same bits: there torch makes a mean of a sum, and of each Python
    number a tensor that it converts, which for small models takes longer than to compute with it.
    """
    if torch.compiler.is_compiling() or type(wide) is not Tensor or not wide.is_cpu:
        return wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * wide).sum(-1, keepdim=True).div_(_number(wide.shape[-1])).add_(_number(eps)).rsqrt_()


@cache
def _number(value: float) -> Tensor:
    """A number that torch need not convert, good for inference and training."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device="cpu")


def _weight(norm: Any) -> Tensor | None:
    """The weight of diffusers' RMSNorm if that and its eps are all that calling `norm` uses."""
    weight: Tensor | None = getattr(norm, "weight", None)
    if type(norm) is not RMSNorm or weight is None or norm.bias is not None or not is_bare(norm):
        return None
    return weight


def _narrow(kind: str | None) -> tuple[torch.dtype, ...]:
    """What a kernel is told beside its usual arguments to round rows to `kind`."""
    return () if kind is None else (NARROW[kind],)


def _rows(fused: Any) -> Rows:
    """What a kernel gave."""
    return fused if isinstance(fused, Tensor) else Quantized(*fused)
