"""What is known of a picture before it is made: an image at a noise level, and the part of it that stays.

Pure functions of tensors; knows neither pixels nor masks' files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .samplers import Sampler, SamplerStep, Velocity


@dataclass(frozen=True)
class Known:
    """An image's latents (1, C, H, W), the noise (1, C, H, W) that takes them to any level, and where they give way:
    `repaint` (1, 1, H, W) is True where the sampler paints."""

    image: Tensor
    noise: Tensor
    repaint: Tensor


def noised(image: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """`image` at noise level `sigma`: the straight path of flow matching (arXiv 2210.02747, eq. 22), in the order of
    operations of diffusers' `scale_noise`."""
    return sigma * noise + (1.0 - sigma) * image


def keeping(sampler: Sampler, known: Known) -> Sampler:
    """`sampler`, but after each step what is not repainted is the image, at the level that the step led to.

    As diffusers' ZImageInpaintPipeline does it (RePaint, arXiv 2201.09865, eq. 8, without its repetitions).
    """

    def step(
        velocity: Velocity, latents: Tensor, sigma: float, sigma_next: float, previous: SamplerStep | None = None
    ) -> SamplerStep:
        taken = sampler(velocity, latents, sigma, sigma_next, previous)
        stays = noised(known.image, known.noise, sigma_next)
        return replace(
            taken,
            latents=torch.where(known.repaint, taken.latents, stays),
            denoised=torch.where(known.repaint, taken.denoised, known.image),
        )

    return step
