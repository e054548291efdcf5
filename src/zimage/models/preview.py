"""Latents as small pictures, while they are being denoised: one pixel for each of theirs, for next to nothing.

A pixel is an affine function of its latent, fitted once to the VAE at hand by encoding coloured patterns. Or a tiny
decoder such as TAEF1 makes pictures in full size. Knows no steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor

from .autoencoder import to_image

SIDE = 256
"""Pixels per side of a pattern."""
CELLS = (4, 8, 16, 32)
"""Cells per side of the patterns: colours of 8 to 64 pixels, plain and blended into each other."""
SHARE_GREY = 0.5


@dataclass(frozen=True)
class LinearPreview:
    """Red, green and blue in [0, 1] of a latent: `weights` (channels, 3) times it plus `offset` (3,), in float32."""

    weights: Tensor
    offset: Tensor

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Image.Image:
        """Latents (1, C, h, w) as the transformer has them to a picture of w x h pixels; NaN is black."""
        values = latents.float().movedim(1, -1).to(self.weights.device)  # (1, h, w, C)
        pixels = (values @ self.weights + self.offset).movedim(-1, 1)
        return to_image(pixels.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1))


@dataclass(frozen=True)
class TinyDecoder:
    """diffusers' `AutoencoderTiny`, which decodes the latents of a larger VAE: TAEF1 those of the released models."""

    vae: Any

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Image.Image:
        """Latents (1, C, h, w) as the transformer has them to a picture of 8w x 8h pixels."""
        config, parameter = self.vae.config, next(self.vae.parameters())
        scaled = latents.to(parameter) / config.scaling_factor + config.shift_factor
        pixels = self.vae.decode(scaled, return_dict=False)[0].float()
        return to_image((pixels * 0.5 + 0.5).nan_to_num(0.0, 1.0, 0.0).clamp(0, 1))


@torch.no_grad()
def fit_preview(vae: Any) -> LinearPreview:
    """The affine function from latents to the mean colours of their pixels, by least squares over encoded patterns.

    On pictures of `demo-turbo` it explains 95 % of the variance of those colours; the affine function that is best for
    those very pictures explains 97 % (`benchmarks/previews.py`).
    """
    config, parameter = vae.config, next(vae.parameters())
    latents, colours = [], []
    for pattern in patterns():
        encoded = vae.encode((pattern * 2 - 1).to(parameter)).latent_dist.mode().float().cpu()
        values = (encoded - (config.shift_factor or 0.0)) * config.scaling_factor
        latents.append(values.flatten(2)[0].T)  # (h * w, C)
        colours.append(F.adaptive_avg_pool2d(pattern, values.shape[2:]).flatten(2)[0].T)
    inputs = torch.cat(latents)
    inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
    solution = torch.linalg.lstsq(inputs.double(), torch.cat(colours).double()).solution.float().to(parameter.device)
    return LinearPreview(solution[:-1], solution[-1])


def patterns() -> list[Tensor]:
    """Pictures (1, 3, SIDE, SIDE) in [0, 1] of coloured and grey cells, as often at the ends of the range as within."""
    generator = torch.Generator("cpu").manual_seed(0)
    kind: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    made = []
    for cells in CELLS:
        colours, greys, picks = (
            torch.rand(1, channels, cells, cells, generator=generator, **kind) for channels in (3, 1, 1)
        )
        mixed = torch.where(picks < SHARE_GREY, greys, colours)
        mixed = (mixed * 3 - 1).clamp(0, 1)
        made.append(F.interpolate(mixed, size=SIDE))
        if cells < CELLS[-1]:
            made.append(F.interpolate(mixed, size=SIDE, mode="bilinear", align_corners=True))
    return made
