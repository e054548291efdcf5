"""How large the model in a checkpoint folder is, for a memory plan: from configs and headers, no weights are read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from ..memory.ring import STAYS
from ..memory.sizes import ModelSizes
from ..rules import native_side
from .locate import locate
from .modules import Blank
from .shards import Shape
from .survey import survey


def checkpoint_sizes(model: str | os.PathLike[str]) -> ModelSizes:
    """The sizes of a model that is on this machine, as `locate` finds it; nothing is downloaded.

    Raises `CheckpointError` for what cannot be found or would not load.
    """
    found = survey(locate(model, local_files_only=True).folder)
    found.require()
    return sizes_of_blanks(found.blanks)


def sizes_of_blanks(blanks: Mapping[str, Blank]) -> ModelSizes:
    """The sizes of the three models, whose weights need not be there."""
    text, transformer, vae = blanks["text_encoder"], blanks["transformer"], blanks["vae"].module
    layers = _by_layer(text, "layers.")
    blocks = [*_by_layer(transformer, "noise_refiner."), *_by_layer(transformer, "layers.")]
    context = _by_layer(transformer, "context_refiner.")
    return ModelSizes(
        text_layers=tuple(layers),
        text_rest=_count(text.needed) - sum(layers),
        blocks=tuple(blocks),
        context_blocks=tuple(context),
        transformer_rest=_count(transformer.needed) - sum(blocks) - sum(context),
        vae=_count(blanks["vae"].needed),
        text_width=text.module.config.hidden_size,
        text_intermediate=text.module.config.intermediate_size,
        dim=transformer.module.config.dim,
        vae_channels=tuple(vae.config.block_out_channels),
        vae_residuals=vae.config.layers_per_block + 1,
        native_side=native_side(vae.config.sample_size),
    )


def _by_layer(blank: Blank, prefix: str) -> list[int]:
    """Parameters of `prefix0.`, `prefix1.`, … in the module that move with it."""
    counts: dict[int, int] = {}
    for name, target in blank.targets.items():
        if target.startswith(prefix) and STAYS not in target:
            number = int(target.removeprefix(prefix).split(".")[0])
            counts[number] = counts.get(number, 0) + math.prod(blank.needed[name])
    return [counts[number] for number in sorted(counts)]


def _count(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
