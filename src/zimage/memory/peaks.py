"""What each stage of a picture needs under a placement: the weights that are there, and what is made beside them.

Pure arithmetic, no torch. Knows no budgets' limits and does not choose (`planner` does).
"""

from __future__ import annotations

from itertools import zip_longest
from typing import NamedTuple

from .pages import all_locked, locked
from .plan import Budget, Placement, Stage
from .sizes import (
    STORED_BYTES,
    ModelSizes,
    Work,
    decode_activations,
    denoise_activations,
    encode_activations,
    text_activations,
    widened_weight,
)

STAGING = 32 << 20
"""Bytes of host memory that weights pass through on their way from a file."""


def predict(sizes: ModelSizes, work: Work, budget: Budget, placement: Placement) -> tuple[Stage, ...]:
    """Peaks while the prompt is encoded and the image, if there is one, in the denoising steps, and in the decode."""
    item, layer = work.itemsize, layers_of(sizes, work, placement)
    streams_text = placement.text_encoder == "streamed"
    slot = max(
        max(layer.text) if streams_text else 0,
        max(layer.blocks) if placement.streamed_blocks else 0,
        0 if placement.context_resident else max(layer.context, default=0),
    )
    layers = placement.slots * slot
    layers += sum(layer.blocks) - sum(layer.blocks[number] for number in placement.streamed)
    layers += sum(layer.context) if placement.context_resident else 0
    layers += sum(layer.text) if placement.text_encoder == "resident" else 0
    rest = sizes.transformer_rest + sizes.vae
    # Where the device is the host it looks tokens up itself.
    rest += sizes.text_rest if not placement.text_waits or (budget.host is None and streams_text) else 0
    resident = int(layers) + rest * item + sizes.adapters
    kept = 0 if budget.host is None else _kept_on_host(sizes, work, placement)
    needs = stage_needs(sizes, work, placement)
    return tuple(Stage(name=name, device=resident + need, host=kept) for name, need in needs.items())


def stage_needs(sizes: ModelSizes, work: Work, placement: Placement) -> dict[str, int]:
    """Bytes of the device that each stage needs beside the weights."""
    text_weight, block_weight = widened_weight(sizes, work)
    is_packed = bool(sizes.packed_blocks or sizes.packed_context)
    text = text_activations(sizes, work) + (text_weight if placement.weights or sizes.packed_text else 0)
    image = {"image": encode_activations(sizes, work, placement.strip_levels)} if work.from_image else {}
    return {
        "prompt": 0 if placement.text_encoder == "cpu" else text,
        **image,
        "denoising": denoise_activations(sizes, work) + (block_weight if placement.weights or is_packed else 0),
        "decoding": decode_activations(sizes, work, placement.strip_levels),
    }


class Layers(NamedTuple):
    """Bytes of each layer that can move."""

    text: list[float]
    blocks: list[float]
    context: list[float]


def layers_of(sizes: ModelSizes, work: Work, placement: Placement) -> Layers:
    """Layers as they are stored: what a file has in fewer bits stays so, the rest is as the placement has it."""
    stored = STORED_BYTES[placement.weights] if placement.weights else work.itemsize

    def of(counts: tuple[int, ...], packed: tuple[int, ...]) -> list[float]:
        return [count * stored + more for count, more in zip_longest(counts, packed, fillvalue=0)]

    return Layers(
        of(sizes.text_layers, sizes.packed_text),
        of(sizes.blocks, sizes.packed_blocks),
        of(sizes.context_blocks, sizes.packed_context),
    )


def _kept_on_host(sizes: ModelSizes, work: Work, placement: Placement) -> int:
    """Bytes of weights that stay in the host's memory. It looks tokens up, so their embedding always does."""
    layer = layers_of(sizes, work, placement)
    blocks = [] if placement.context_resident else list(layer.context)
    blocks += [layer.blocks[number] for number in placement.streamed]
    text = layer.text if placement.text_encoder == "streamed" else []
    kept = int(sum(layer.text)) if placement.text_encoder == "cpu" else 0
    passed = 0
    for source, layers in ((placement.text_source, text), (placement.block_source, blocks)):
        if source == "memory":
            kept += all_locked(tuple(layers))
        elif layers:  # each is read into one place, which has room for any
            passed = locked(max([*text, *blocks]))
    rest = sizes.text_rest if placement.text_waits else 0
    is_staged = placement.slots > 0 or placement.text_encoder == "cpu"
    return kept + passed + rest * work.itemsize + (STAGING if is_staged else 0)
