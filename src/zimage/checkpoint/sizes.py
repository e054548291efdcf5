"""How large a model is, for a memory plan: from configs and headers, no weights are read, or from its modules."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..memory.ring import STAYS
from ..memory.sizes import ModelSizes
from ..rules import native_side
from .configs import PARTS
from .locate import locate
from .modules import Blank
from .survey import survey


def checkpoint_sizes(model: str | os.PathLike[str]) -> ModelSizes:
    """The sizes of a model that is on this machine, as `locate` finds it; nothing is downloaded.

    Raises `CheckpointError` for what cannot be found or would not load.
    """
    found = survey(locate(model, local_files_only=True).folder)
    found.require()
    return sizes_of_blanks(found.blanks)


def sizes_of_blanks(blanks: Mapping[str, Blank]) -> ModelSizes:
    """The sizes of the three models of a checkpoint."""
    return sizes_of_models(*(blanks[component].module for component in PARTS))


def sizes_of_models(text_encoder: Any, transformer: Any, vae: Any) -> ModelSizes:
    """The sizes of the three models, whose weights need not be there."""
    layers = _by_layer(text_encoder, "layers.")
    blocks = [*_by_layer(transformer, "noise_refiner."), *_by_layer(transformer, "layers.")]
    context = _by_layer(transformer, "context_refiner.")
    return ModelSizes(
        text_layers=tuple(layers),
        text_rest=_count(text_encoder) - sum(layers),
        blocks=tuple(blocks),
        context_blocks=tuple(context),
        transformer_rest=_count(transformer) - sum(blocks) - sum(context),
        vae=_count(vae),
        text_width=text_encoder.config.hidden_size,
        text_intermediate=text_encoder.config.intermediate_size,
        dim=transformer.config.dim,
        vae_channels=tuple(vae.config.block_out_channels),
        vae_residuals=vae.config.layers_per_block + 1,
        native_side=native_side(vae.config.sample_size),
    )


def _by_layer(model: Any, prefix: str) -> list[int]:
    """Parameters of `prefix0.`, `prefix1.`, … in the module that move with it."""
    counts: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(prefix) and STAYS not in name:
            number = int(name.removeprefix(prefix).split(".")[0])
            counts[number] = counts.get(number, 0) + parameter.numel()
    return [counts[number] for number in sorted(counts)]


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
