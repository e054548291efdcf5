"""Attention between all pixels of a picture by one head, wider than torch has a fast kernel for, some rows at a time.

Of heads wider than 256 torch's attention on CUDA is its slowest. Where kernels are used, in half precision, scores of
some rows are made, normalised and multiplied with the values here, by the products that cards are fastest at. Elsewhere
the module is called as it stands, and so is one that is hooked, replaced or unknown. Knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from ..kernels.switch import usable, wanted
from .layers import is_bare
from .pictures import HALF, add

NARROW_HEAD = 256
"""Channels of the widest head that torch has FlashAttention for."""
MOST_SCORES = 2**25
"""Numbers of a chunk of scores, in float32; at most two such chunks are there at once. Of 128 x 128 pixels an H200 took
2.8 ms with half as many, 2.6 with these and 2.25 with all at once, torch's own attention 4.1."""
CARDS = (8, 0)
"""Compute capability from which on cards multiply bfloat16."""

_GIVES_FLOAT32 = torch.version.cuda is not None and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
"""Whether torch multiplies half precision to float32."""


def attend(module: Any, hidden: Tensor) -> Tensor:
    """`module(hidden)` of a picture (B, C, H, W) and diffusers' attention."""
    if wanted(hidden) and _is_faster(hidden) and _is_plain(module) and usable(hidden, *module.parameters()):
        return _attended(module, hidden)
    result: Tensor = module(hidden, temb=None)
    return result


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`softmax(query key^T) value` of rows (N, width), (M, width) and (M, width), the query with its scale; scores and
    sums are in float32, and what multiplies the values is rounded to their type."""
    rows = max(1, MOST_SCORES // len(key))
    result = value.new_empty(len(query), value.shape[1])
    for first in range(0, len(query), rows):
        scores = _product(query[first : first + rows], key.t())
        scores = scores.softmax(dim=-1)
        result[first : first + rows] = _product(scores.to(value.dtype), value)
    return result


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of two matrices, in float32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _attended(module: Attention, hidden: Tensor) -> Tensor:
    normal = module.group_norm(hidden).flatten(2)[0].t()  # (N, C)
    turned, scale = module.to_q, module.to_q.out_features**-0.5
    query = torch.addmm(turned.bias, normal, turned.weight.t(), beta=scale, alpha=scale)  # rounded once, as without it
    update = module.to_out[0](attention(query, module.to_k(normal), module.to_v(normal)))
    return add(update.t().unflatten(1, hidden.shape[2:])[None], None, hidden)


def _is_faster(hidden: Tensor) -> bool:
    """Whether this is done for such a picture, on such a device; only one at a time."""
    if not (_GIVES_FLOAT32 and hidden.is_cuda and hidden.dtype in HALF and len(hidden) == 1):
        return False
    return torch.cuda.get_device_capability(hidden.device) >= CARDS


def _is_plain(module: Any) -> bool:
    """Whether `module` is a group norm, one wide head between all pixels and a sum with the picture, nothing else."""
    return (
        type(module) is Attention
        and type(module.processor) is AttnProcessor2_0
        and module.heads == 1
        and module.inner_dim > NARROW_HEAD
        and module.residual_connection
        and module.rescale_output_factor == 1
        and module.spatial_norm is module.norm_q is module.norm_k is None
        and type(module.group_norm) is nn.GroupNorm
        and all(type(one) is nn.Linear for one in (module.to_q, module.to_k, module.to_v, module.to_out[0]))
        and module.to_q.bias is not None
        and type(module.to_out[1]) is nn.Dropout
        and (module.to_out[1].p == 0 or not module.to_out[1].training)
        and all(is_bare(one) for one in module.modules())
    )
