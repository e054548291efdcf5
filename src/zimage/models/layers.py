"""What lies between the weights: norms, gates, rotations and activations, with few passes over memory.

On CUDA each is one fused kernel (`kernels`) where it applies. Elsewhere it is done in place where nobody else can see
the tensor in between, with the bits of the plain expression. Works on any module: one that is hooked, replaced or
unknown is called as it stands. Knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from ..kernels.switch import run, wanted
from .rope import rotate


def is_bare(module: Any) -> bool:
    """Whether calling `module` runs its class's `forward` and nothing else: no hooks, no replaced `forward`."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return not any(hooks) and "forward" not in module.__dict__


def normalize(norm: Any, hidden: Tensor, factor: Tensor | None = None) -> Tensor:
    """`norm(hidden)`, times `factor` if there is one; `norm` is diffusers' RMSNorm or anything in its place.

    Formed as diffusers does: the mean square in float32 (arXiv 1910.07467, eq. 4), then in the type of the weight.
    """
    weight = _weight(norm)
    if weight is None:
        normal = norm(hidden)
        return normal if factor is None else normal * factor
    if wanted(hidden):
        fused: Tensor | None = run("normalize", hidden, weight, factor, norm.eps)
        if fused is not None:
            return fused
    wide = hidden.float()
    inverse = wide.pow(2).mean(-1, keepdim=True).add_(norm.eps).rsqrt_()
    normal = (wide * inverse).to(weight.dtype).mul_(weight)
    if factor is None:
        return normal
    return normal.mul_(factor) if factor.dtype == normal.dtype else normal * factor


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
) -> tuple[Tensor, Tensor]:
    """`add_normalized(tokens, norm, update, gate)`, and `normalize(next_norm, ..., next_factor)` of that."""
    if wanted(tokens):
        weight, next_weight = _weight(norm), _weight(next_norm)
        if weight is not None and next_weight is not None:
            following = next_weight, next_factor, next_norm.eps
            fused = run("add_then_normalize", tokens, update, weight, gate, norm.eps, *following)
            if fused is not None:
                return fused[0], fused[1]
    tokens = add_normalized(tokens, norm, update, gate)
    return tokens, normalize(next_norm, tokens, next_factor)


def rotate_normalized(
    query_norm: Any, key_norm: Any, query: Tensor, key: Tensor, rotations: Tensor
) -> tuple[Tensor, Tensor]:
    """`query` and `key` (B, N, heads, head_dim), each head normalised if there is a norm, then turned by `rotate`."""
    if wanted(query):
        weights = _weight(query_norm), _weight(key_norm)
        if weights[0] is not None and weights[1] is not None:
            fused = run("rotate_normalized", query, key, *weights, rotations, query_norm.eps, key_norm.eps)
            if fused is not None:
                return fused[0], fused[1]
    if query_norm is not None:
        query = normalize(query_norm, query)
    if key_norm is not None:
        key = normalize(key_norm, key)
    query, key = rotate(torch.cat([query, key], dim=2), rotations).chunk(2, dim=2)
    return query, key


def gate(opening: Any, content: Any, hidden: Tensor, scale: float = 1.0) -> Tensor:
    """`silu(opening(hidden)) * (content(hidden) * scale)` of two modules."""
    if not wanted(hidden):
        opened, held = activate(opening, hidden), content(hidden)
        return opened.mul_(held if scale == 1.0 else held * scale)
    opened, held = opening(hidden), content(hidden)
    in_place = is_bare(opening) and opened is not hidden
    fused: Tensor | None = run("gate", opened, held, scale, in_place)
    if fused is not None:
        return fused
    return F.silu(opened, inplace=in_place).mul_(held if scale == 1.0 else held * scale)


def activate(module: Any, hidden: Tensor) -> Tensor:
    """`silu(module(hidden))`; of a group norm, fused where that applies."""
    if type(module) is nn.GroupNorm and wanted(hidden) and module.affine and is_bare(module):
        fused: Tensor | None = run("activate_groups", hidden, module.weight, module.bias, module.num_groups, module.eps)
        if fused is not None:
            return fused
    result = module(hidden)
    return F.silu(result, inplace=is_bare(module) and result is not hidden)


def _weight(norm: Any) -> Tensor | None:
    """The weight of diffusers' RMSNorm if that and its eps are all that calling `norm` uses."""
    weight: Tensor | None = getattr(norm, "weight", None)
    if type(norm) is not RMSNorm or weight is None or norm.bias is not None or not is_bare(norm):
        return None
    return weight
