"""How large a model is, for a memory plan: from configs and headers, no weights are read, or from its modules."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..memory.ring import STAYS
from ..memory.sizes import FLOAT8, GGML_BLOCKS, ModelSizes
from ..models.quantized import PackedLinear
from ..models.transformer import BLOCKS
from ..rules import native_side
from .configs import PARTS
from .locate import locate
from .modules import Blank
from .survey import Survey, survey


def local_checkpoint(
    model: str | os.PathLike[str],
    *,
    transformer: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
) -> Survey:
    """What a model on this machine is made of, as `locate` finds it with these files; nothing is downloaded.

    Raises `CheckpointError` for what cannot be found or would not load.
    """
    place = locate(model, transformer=transformer, text_encoder=text_encoder, vae=vae, local_files_only=True)
    found = survey(place.folder, place.files)
    found.require()
    return found


def sizes_of(found: Survey) -> ModelSizes:
    """The sizes of a checkpoint without errors, and whether the matrices of its layers are in bfloat16."""
    matrices = (
        (entry.dtype, entry.scale)
        for component, layers in (("text_encoder", ("layers",)), ("transformer", BLOCKS))
        for name, entry in found.weights[component].entries.items()
        if len(entry.shape) == 2 and STAYS not in name and set(name.split(".")).intersection(layers)
    )
    in_bfloat16 = all(dtype in (*GGML_BLOCKS, *FLOAT8) or (dtype == "BF16" and not scale) for dtype, scale in matrices)
    return replace(sizes_of_blanks(found.blanks), in_bfloat16=in_bfloat16)


def sizes_of_blanks(blanks: Mapping[str, Blank]) -> ModelSizes:
    """The sizes of the three models of a checkpoint."""
    return sizes_of_models(*(blanks[component].module for component in PARTS))


def sizes_of_models(text_encoder: Any, transformer: Any, vae: Any) -> ModelSizes:
    """The sizes of the three models, whose weights need not be there."""
    layers = _by_layer(text_encoder, "layers")
    blocks = [*_by_layer(transformer, "noise_refiner"), *_by_layer(transformer, "layers")]
    context = _by_layer(transformer, "context_refiner")
    packed_text, packed_context = _packed(text_encoder, "layers"), _packed(transformer, "context_refiner")
    packed = [*_packed(transformer, "noise_refiner"), *_packed(transformer, "layers")]
    is_packed = any(packed) or any(packed_context)
    return ModelSizes(
        text_layers=tuple(layers),
        text_rest=_count(text_encoder) - sum(layers) - sum(packed_text),
        blocks=tuple(blocks),
        context_blocks=tuple(context),
        transformer_rest=_count(transformer) - sum(blocks) - sum(context) - sum(packed) - sum(packed_context),
        vae=_count(vae),
        text_width=text_encoder.config.hidden_size,
        text_intermediate=text_encoder.config.intermediate_size,
        dim=transformer.config.dim,
        vae_channels=tuple(vae.config.block_out_channels),
        vae_residuals=vae.config.layers_per_block + 1,
        native_side=native_side(vae.config.sample_size),
        packed_blocks=tuple(packed) if is_packed else (),
        packed_context=tuple(packed_context) if is_packed else (),
        packed_text=tuple(packed_text) if any(packed_text) else (),
    )


def _by_layer(model: Any, blocks: str) -> list[int]:
    """Parameters of each of the `blocks` that move with it."""
    return [
        sum(one.numel() for name, one in block.named_parameters() if STAYS not in name) - count
        for block, count in zip(getattr(model, blocks), _packed(model, blocks), strict=True)
    ]


def _packed(model: Any, blocks: str) -> list[int]:
    """Bytes in each of the `blocks` that a file has in fewer bits."""
    return [
        sum(one.weight.numel() for one in block.modules() if isinstance(one, PackedLinear))
        for block in getattr(model, blocks)
    ]


def _count(model: Any) -> int:
    """Parameters, and bytes of what is packed."""
    return sum(parameter.numel() for parameter in model.parameters())
