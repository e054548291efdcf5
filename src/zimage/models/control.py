"""A ControlNet beside the transformer: what an image of edges, of depth or of a pose adds after some of its layers.

The weights are diffusers' `ZImageControlNetModel`; what it shares with the transformer (embedders, refiners, captions,
positions) is taken from there as it was computed, and each control layer runs just before its hint is added, so that
one hint is held at a time. Knows no files and no pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from torch import Tensor, nn

from .block import BlockModulation
from .precision import overflow_scale, residual_dtype
from .transformer import PATCH, Caption, Hint, ImageGrid, Modulation, ZImageTransformer

Beside = Callable[[Caption, ImageGrid], Hint]
"""Gives the hints for one run of the transformer's layers, beside a caption on its grid."""
PARTS = ("control_layers", "control_all_x_embedder", "control_noise_refiner")
"""The modules of a ControlNet that are its own; others are the transformer's."""


@dataclass(frozen=True, eq=False)
class Control:
    """What steers one picture: a ControlNet, its input (1, channels, H, W) in latents, and how much of it is added."""

    net: ZImageControlNetModel
    context: Tensor
    scale: float


def sees_masks(net: ZImageControlNetModel, latent_channels: int) -> bool:
    """Whether beside the control image it takes a mask and the image that is repainted, as those from 2.0 on do."""
    return bool(net.config.control_in_dim == 2 * latent_channels + 1)


def context_of(control: Tensor, channels: int, kept: Tensor | None = None, image: Tensor | None = None) -> Tensor:
    """A ControlNet's input (1, channels, H, W) from the latents (1, C, H, W) of a control image.

    `kept` (1, 1, H, W) is 1 where the `image`, latents too, is not repainted; zeros take the place of what is missing.
    """
    parts = [control] if kept is None or image is None else [control, kept.to(control.dtype), image]
    missing = channels - sum(part.shape[1] for part in parts)
    empty = [control.new_zeros(1, missing, *control.shape[2:])] if missing else []
    return torch.cat([*parts, *empty], dim=1)


class Steering:
    """A ControlNet at work on one picture: its image embedded once, and its modulations by noise level."""

    def __init__(
        self, transformer: ZImageTransformer, control: Control, times: Sequence[float], grid: ImageGrid
    ) -> None:
        """`times` are the model's, `1 − sigma`, of all levels that are denoised; `grid` is one of the picture's."""
        self._transformer, self._net, self._scale = transformer, control.net, control.scale
        self._refiner = list(control.net.control_noise_refiner or ())
        device = transformer.x_pad_token.device
        steps = torch.tensor(times, dtype=torch.float32, device=device)
        blocks = [*control.net.control_layers, *self._refiner]
        self._modulations = dict(zip(times, transformer.modulations_of(blocks, steps), strict=True))
        embedder = control.net.control_all_x_embedder[f"{PATCH}-1"]
        self._embedded = transformer.embed(control.context.to(device), grid, embedder)  # (1, padded, dim)

    def at(self, latents: Tensor, grid: ImageGrid, time: float, modulation: Modulation, refined: Tensor) -> Beside:
        """The part of a step that no caption enters, from the transformer's own `refined` tokens.

        As in diffusers the hints of the control refiner reach what the control layers begin with, and not the
        transformer's own tokens.
        """
        net, modulations = self._net, self._modulations[time]
        layers, refiner = modulations[: len(net.control_layers)], modulations[len(net.control_layers) :]
        tokens, rotations = self._embedded, grid.rotations[:, : grid.padded]
        if net.add_control_noise_refiner is None:
            for block, block_modulation in zip(self._refiner, refiner, strict=True):
                tokens = self._transformer._run_block(block, tokens, rotations, block_modulation)
            return partial(self._beside, layers, tokens, refined)
        twice = net.add_control_noise_refiner == "control_layers"
        blocks, own = (list(net.control_layers), layers) if twice else (self._refiner, refiner)
        places = dict(enumerate(net.control_refiner_layers_places))
        hints: dict[int, Tensor] = {}
        running = self._run(blocks, own, tokens, self._transformer.embed(latents, grid), rotations)
        for number, (block, tokens) in enumerate(running):
            if number in places:
                hints[places[number]] = self._hint(block, tokens)
        image = self._transformer.refine(latents, grid, modulation, hints.get)
        return partial(self._beside, layers, tokens, image)

    def _beside(
        self, modulations: Sequence[BlockModulation], tokens: Tensor, image: Tensor, caption: Caption, grid: ImageGrid
    ) -> Hint:
        """From the control's `tokens` and what its layers begin with, `image`; each hint is computed when asked for."""
        tokens, image = (torch.cat([part, caption.tokens], dim=1) for part in (tokens, image))
        running = self._run(list(self._net.control_layers), modulations, tokens, image, grid.rotations)
        places = frozenset(self._net.control_layers_places)
        return lambda number: self._hint(*next(running)) if number in places else None

    def _run(
        self,
        blocks: Sequence[Any],
        modulations: Sequence[BlockModulation],
        tokens: Tensor,
        beside: Tensor,
        rotations: Tensor,
    ) -> Iterator[tuple[Any, Tensor]]:
        """Each control block with the tokens (B, N, dim) after it; `beside` are the transformer's, which enter once."""
        tokens = _project(blocks[0].before_proj, tokens, self._transformer.compute_dtype) + beside
        del beside  # which the blocks' memory would lack
        for block, modulation in zip(blocks, modulations, strict=True):
            tokens = self._transformer._run_block(block, tokens, rotations, modulation)
            yield block, tokens

    def _hint(self, block: Any, tokens: Tensor) -> Tensor:
        return _project(block.after_proj, tokens, self._transformer.compute_dtype) * self._scale


def share(net: Any, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> ZImageControlNetModel:
    """A ControlNet of the same weights, which are shared where they are of this type and place, else converted.

    Moving or converting it later leaves `net` as it is, and nothing of a transformer is in it.
    """
    shared = build(config)
    for name, tensor in net.state_dict().items():
        if name.startswith(PARTS):
            place, _, leaf = name.rpartition(".")
            own = nn.Parameter(tensor.detach().to(device=device, dtype=dtype), requires_grad=False)
            setattr(shared.get_submodule(place), leaf, own)
    return shared


def build(config: Mapping[str, Any]) -> ZImageControlNetModel:
    """A ControlNet without values, on the meta device."""
    with torch.device("meta"):
        return ZImageControlNetModel(**config).eval().requires_grad_(False)


def _project(layer: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """`layer(tokens)` in the type of the residual stream; where that is wider, scaled as in the blocks."""
    scale = overflow_scale(dtype)
    if scale == 1.0:
        projected: Tensor = layer(tokens.to(dtype))
        return projected
    scaled = F.linear((tokens * scale).to(dtype), layer.weight, layer.bias * scale)
    return scaled.to(residual_dtype(dtype)) / scale
