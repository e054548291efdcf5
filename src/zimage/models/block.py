"""One block of the transformer: a function of the modules that hold its weights and of the tokens that go through.

Every submodule that holds weights is called as a module, so adapters and quantised layers take effect. Knows nothing of
images, captions or steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention import row_kind_of
from .layers import add_normalized, add_then_normalize, gate, normalize, rotate_normalized, row_kind
from .precision import overflow_scale
from .rowwise import Rows

BlockModulation = tuple[Tensor, Tensor, Tensor, Tensor]
"""attention scale, attention gate, feed-forward scale, feed-forward gate; each (B, 1, dim)."""


def run_block(
    block: Any,
    tokens: Tensor,
    rotations: Tensor,
    modulation: BlockModulation | None,
    compute_dtype: torch.dtype,
    attend: Callable[..., Tensor],
) -> Tensor:
    """`tokens` (B, N, dim) after `block`, of the residual stream's type; `rotations` (1, N, head_dim / 2), complex."""
    scale = overflow_scale(compute_dtype)
    attention_scale, attention_gate, feed_forward_scale, feed_forward_gate = modulation or (None,) * 4
    attention, feed_forward = block.attention, block.feed_forward
    kind = row_kind(attention.to_q, attention.to_k, attention.to_v)
    hidden = normalize(block.attention_norm1, tokens, attention_scale, kind)
    update = _attention(attention, hidden, rotations, scale, attend)
    kind = row_kind(feed_forward.w1, feed_forward.w3)
    tokens, hidden = add_then_normalize(
        tokens, block.attention_norm2, update, attention_gate, block.ffn_norm1, feed_forward_scale, kind
    )
    update = _feed_forward(feed_forward, hidden, scale)
    return add_normalized(tokens, block.ffn_norm2, update, feed_forward_gate)


def _attention(attention: Any, hidden: Rows, rotations: Tensor, scale: float, attend: Callable[..., Tensor]) -> Tensor:
    def heads(project: Any) -> Tensor:
        return project(hidden).unflatten(-1, (attention.heads, -1))  # (B, N, heads, head_dim)

    value = heads(attention.to_v)
    kind = row_kind_of(attend, value)
    query, key = rotate_normalized(
        attention.norm_q, attention.norm_k, heads(attention.to_q), heads(attention.to_k), rotations, kind
    )
    mixed = attend(query, key, value, backend=attention.processor._attention_backend)
    mixed = mixed.flatten(2, 3)  # (B, N, dim)
    if scale != 1.0:
        mixed = mixed * scale
    for module in attention.to_out:
        mixed = module(mixed)
    return mixed if scale == 1.0 else mixed.float() / scale


def _feed_forward(feed_forward: Any, hidden: Rows, scale: float) -> Tensor:
    product = gate(feed_forward.w1, feed_forward.w3, hidden, scale, row_kind(feed_forward.w2))
    update = feed_forward.w2(product)
    return update if scale == 1.0 else update.float() / scale
