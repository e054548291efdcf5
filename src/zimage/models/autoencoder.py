"""Latents to pixels, one image at a time. diffusers' AutoencoderKL does the work; knows nothing of prompts or files."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .precision import finite


class Autoencoder:
    """Owns the VAE and the affine map between its latents and the transformer's."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (1, 16, h, w) of one image to pixels (1, 3, 8h, 8w) in [0, 1], in the VAE's type.

        `z / scaling_factor + shift_factor` as in the checkpoint's config (Flux's VAE: 0.3611 and 0.1159). Raises
        `NonFiniteError` if the pixels are not finite in float32 either.
        """
        config = self.vae.config
        scaled = latents.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
        pixels = finite(lambda: self.vae.decode(scaled, return_dict=False)[0], "the image decoder")
        return (pixels * 0.5 + 0.5).clamp(0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (1, 3, H, W) in [0, 1] as an 8-bit RGB image."""
    array = pixels[0].permute(1, 2, 0).float().mul(255).round().to(torch.uint8).cpu().numpy()  # (H, W, 3)
    return Image.fromarray(array)
