"""The three models of a checkpoint, built from checked configs without memory, and the tensors that each needs.

Modules are made on the meta device of the calling thread alone, so other threads may build theirs meanwhile. Knows no
files: the names of tensors in them come in, and which tensor goes where comes out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RotaryEmbedding

from ..errors import CheckpointError
from ..models.transformer import ZImageTransformer
from .reading import reason
from .shards import Shape

_PREFIX = "model."
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Blank:
    """A model without values: `needed` and `spare` are shapes by the name in the files.

    `targets` gives each needed name's parameter in `module`; `spare` are tensors that zimage never uses.
    """

    module: Any
    needed: dict[str, Shape]
    targets: dict[str, str]
    spare: dict[str, Shape]


def build(component: str, config: dict[str, Any], names: Collection[str]) -> Blank:
    """The module of `component` without values; `names` are those of the tensors in its files."""
    try:
        with torch.device("meta"):
            if component == "text_encoder":
                module: Any = _text_encoder(config)
            else:
                module = ZImageTransformer(**config) if component == "transformer" else AutoencoderKL(**config)
    except Exception as error:
        raise CheckpointError(
            f"{component}/config.json describes no {component} that can be built: {reason(error)}"
        ) from error
    if component == "text_encoder":
        # Its frequencies are computed, not stored, so they must be made outside of the meta device.
        with torch.device("cpu"):
            module.rotary_emb = Qwen3RotaryEmbedding(module.config)
    module.eval().requires_grad_(False)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if component != "text_encoder":
        return Blank(module=module, needed=shapes, targets={name: name for name in shapes}, spare={})
    # Qwen3Model saves plain names; the language model, and both classes' folders on the hub, put its own before them.
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in names) else ""
    return Blank(
        module=module,
        needed={prefix + name: shape for name, shape in shapes.items()},
        targets={prefix + name: name for name in shapes},
        spare=_spare(config, shapes, prefix),
    )


def _text_encoder(config: dict[str, Any]) -> Qwen3Model:
    """Qwen3 as Z-Image uses it: what leaves the last layer but one, so that one and the final norm are left out."""
    layers = config["num_hidden_layers"] - 1
    model = Qwen3Model(Qwen3Config(**config | {"num_hidden_layers": layers}, attn_implementation="sdpa"))
    model.norm = nn.Identity()
    return model


def _spare(config: dict[str, Any], shapes: dict[str, Shape], prefix: str) -> dict[str, Shape]:
    first, last = "layers.0.", f"layers.{config['num_hidden_layers'] - 1}."
    layer = {last + name.removeprefix(first): shape for name, shape in shapes.items() if name.startswith(first)}
    spare = {**layer, "norm.weight": (config["hidden_size"],)}
    return {**{prefix + name: shape for name, shape in spare.items()}, _HEAD: shapes["embed_tokens.weight"]}
