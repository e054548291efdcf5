"""Where a picture starts: from noise, or from an image that noise takes to the level of its first step.

Knows requests, canvases and the autoencoder; not what is done with the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .canvas import has_mask, lay_out
from .denoiser import schedule
from .models.autoencoder import Autoencoder
from .request import ResolvedRequest
from .rules import Limits
from .sampling.known import Known, noised
from .sampling.noise import noise_of, seeded_noise


@dataclass(frozen=True)
class Start:
    """Latents (1, C, H, W) at the schedule's first level, in float32, and what of an image stays through the steps."""

    latents: Tensor
    known: Known | None = None


def from_noise(request: ResolvedRequest, shape: Sequence[int], device: torch.device) -> Start:
    """The noise of the request's seed, or the latents that it was given."""
    given = request.tensors.get("latents")
    noise = seeded_noise(request.seed, shape)[None] if given is None else given
    return Start(noise.to(device=device, dtype=torch.float32))


def from_image(
    request: ResolvedRequest,
    shape: Sequence[int],
    device: torch.device,
    autoencoder: Autoencoder,
    limits: Limits,
    strip_levels: int,
) -> Start:
    """The request's image, encoded with so many levels in strips, at the first level of its schedule.

    The seed is drawn from twice, as diffusers' pipelines do: for the sample of the encoder's distribution, and for the
    noise.
    """
    generator = torch.Generator("cpu").manual_seed(request.seed)
    spread, noise = (noise_of(generator, (1, *shape)).to(device) for _ in range(2))
    canvas = lay_out(request, limits)
    image = autoencoder.encode(canvas.pixels.to(device), spread, strip_levels)
    known = Known(image, noise, canvas.repaint(limits.latent_scale).to(device)) if has_mask(request) else None
    return Start(noised(image, noise, schedule(request)[0].item()), known)
