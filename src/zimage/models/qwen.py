"""Qwen3's layers with fused kernels between their matrix products: a prompt costs a quarter of the launches.

A prompt is short, so that on CUDA nearly all of its time is starting kernels: some 55 for each layer as transformers
writes it, 14 here. Called for a whole prompt without padding; the order of operations and of roundings is the model's
own, but that queries and keys are turned in float32. Knows no tokenizer and no cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from ..kernels.switch import run, wanted
from .layers import acts, is_bare

MULTIPLE = 32
"""Tokens that a prompt is filled up to a multiple of. What comes behind a token does not change it and weights are read
for so many in one go, so there are few sizes that a recording may be kept of."""

_SILU = type(ACT2FN["silu"])


def is_plain(model: Any) -> bool:
    """Whether `model` computes what `hidden_states` does: layers of transformers' own classes that see all tokens
    before them, its last norm gone, and no hooks but of what moves its layers, whose `hold` is called instead."""
    if type(model) is not qwen3.Qwen3Model or model.training or type(model.norm) is not nn.Identity:
        return False
    if model.has_sliding_layers or not len(model.layers) or not is_bare(model):
        return False
    mover = getattr(vars(model).get("hold"), "__self__", None)
    return all(_is_plain_layer(layer, mover) for layer in model.layers)


def _is_plain_layer(layer: Any, mover: Any) -> bool:
    """Whether what is not called of it is what it seems; its projections are called, whatever they are."""
    if type(layer) is not qwen3.Qwen3DecoderLayer or "forward" in vars(layer) or layer._backward_hooks:
        return False
    hooks = chain(layer._forward_pre_hooks.values(), layer._forward_hooks.values())
    if any(acts(hook) and (mover is None or getattr(hook, "__self__", None) is not mover) for hook in hooks):
        return False
    attention, feed_forward = layer.self_attn, layer.mlp
    if type(attention) is not qwen3.Qwen3Attention or type(feed_forward) is not qwen3.Qwen3MLP:
        return False
    if type(feed_forward.act_fn) is not _SILU:
        return False
    norms = layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm
    if any(type(norm) is not qwen3.Qwen3RMSNorm for norm in norms):
        return False
    return all(map(is_bare, (attention, feed_forward, feed_forward.act_fn, *norms)))


def hidden_states(
    model: Any, embedded: Tensor, compute: Callable[..., Tensor | None] = lambda own, *args: own(*args)
) -> Tensor | None:
    """Embedded tokens (1, tokens, width) after all layers of `model`, for which `is_plain` holds; `None` where a kernel
    does not take them, and the model has to be called itself.

    `compute` gives what a function of tensors gives, in a way of its own.
    """
    if not wanted(embedded):
        return None
    tokens = embedded.shape[1]
    states = compute(partial(_all_layers, model), F.pad(embedded, (0, 0, 0, -tokens % MULTIPLE)))
    return None if states is None else states[:, :tokens]


def _all_layers(model: Any, embedded: Tensor) -> Tensor | None:
    cosine, sine = model.rotary_emb(embedded, torch.arange(embedded.shape[1], device=embedded.device)[None])
    half = cosine.shape[-1] // 2  # the second half repeats the first
    rotations = torch.complex(cosine[..., :half].float(), sine[..., :half].float())  # (1, tokens, head_dim / 2)
    hold = vars(model).get("hold", lambda layer: nullcontext())
    tokens: Tensor | None = embedded
    for layer in model.layers:  # to the last one also where a kernel refuses: what passes through does so in order
        with hold(layer):
            tokens = None if tokens is None else _layer(layer, tokens, rotations)
    return tokens


def _layer(layer: Any, tokens: Tensor, rotations: Tensor) -> Tensor | None:
    norms = layer.input_layernorm, layer.post_attention_layernorm
    hidden = run("normalize", tokens, norms[0].weight, None, norms[0].variance_epsilon)
    update = None if hidden is None else _attention(layer.self_attn, hidden, rotations)
    if update is None:
        return None
    added = run("add_then_normalize", tokens, update, None, None, 0.0, norms[1].weight, None, norms[1].variance_epsilon)
    update = None if added is None else _feed_forward(layer.mlp, added[1])
    return None if update is None else added[0] + update


def _attention(attention: Any, hidden: Tensor, rotations: Tensor) -> Tensor | None:
    query, key, value = (
        project(hidden).unflatten(-1, (-1, attention.head_dim))  # (1, tokens, heads, head_dim)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    norms = attention.q_norm, attention.k_norm
    turned = run(
        "rotate_normalized", query, key, *(norm.weight for norm in norms), rotations,
        *(norm.variance_epsilon for norm in norms), True,
    )  # fmt: skip
    if turned is None:
        return None
    query, key, value = (one.transpose(1, 2) for one in (*turned, value))
    mixed = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=attention.scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    result: Tensor = attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return result


def _feed_forward(feed_forward: Any, hidden: Tensor) -> Tensor | None:
    opened, content = feed_forward.gate_proj(hidden), feed_forward.up_proj(hidden)
    product = run("gate", opened, content, 1.0, True)
    return None if product is None else feed_forward.down_proj(product)
