"""Where a picture starts: from noise, or from an image that noise takes to the level of its first step; and what steers
it from there.

Knows requests, canvases and the autoencoder; not what is done with the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from torch import Tensor

from .canvas import Canvas, has_mask, lay_out, lay_out_control
from .denoiser import schedule
from .models.autoencoder import Autoencoder
from .models.control import Control, context_of, sees_masks
from .request import ResolvedRequest
from .rules import Limits
from .sampling.known import Known, noised
from .sampling.noise import noise_of, seeded_noise


@dataclass(frozen=True)
class Start:
    """Latents (1, C, H, W) at the schedule's first level, in float32, what of an image stays through the steps, and the
    ControlNet that steers them."""

    latents: Tensor
    known: Known | None = None
    control: Control | None = None


def begin(
    request: ResolvedRequest,
    shape: Sequence[int],
    device: torch.device,
    autoencoder: Autoencoder,
    limits: Limits,
    net: ZImageControlNetModel | None,
    strip_levels: int,
    larger: Tensor | None = None,
) -> Start:
    """The request's start, steered by `net` if that is given; images are encoded with so many levels in strips.

    A second pass starts from `larger`, see `enlarged`.

    As in diffusers' ZImageControlNetInpaintPipeline, a ControlNet that sees masks is told what stays, so that nothing
    is put back between the steps, and at strength 1 the start is noise alone.
    """
    told = net is not None and has_mask(request) and sees_masks(net, limits.latent_channels)
    canvas = None if request.image is None else lay_out(request, limits)
    if larger is not None:
        start = from_larger(request, larger, shape, autoencoder, strip_levels)
    elif canvas is None or (told and request.strength == 1):
        start = from_noise(request, shape, device)
    else:
        start = from_image(request, canvas, shape, device, autoencoder, limits, strip_levels)
        start = replace(start, known=None) if told else start
    if net is None or request.controlnet_conditioning_scale == 0:
        return start

    def encode(pixels: Tensor) -> Tensor:
        return autoencoder.encode(pixels.to(device), None, strip_levels)

    seen: tuple[Tensor, ...] = ()
    if told and canvas is not None:
        kept = ~canvas.repaint(limits.latent_scale).to(device)
        seen = kept, encode(canvas.cut_out())
    context = context_of(encode(lay_out_control(request, limits)), net.config.control_in_dim, *seen)
    return replace(start, control=Control(net, context, request.controlnet_conditioning_scale))


def from_noise(request: ResolvedRequest, shape: Sequence[int], device: torch.device) -> Start:
    """The noise of the request's seed, or the latents that it was given."""
    given = request.tensors.get("latents")
    noise = seeded_noise(request.seed, shape)[None] if given is None else given
    return Start(noise.to(device=device, dtype=torch.float32))


def from_image(
    request: ResolvedRequest,
    canvas: Canvas,
    shape: Sequence[int],
    device: torch.device,
    autoencoder: Autoencoder,
    limits: Limits,
    strip_levels: int,
) -> Start:
    """The request's image on its `canvas`, encoded with so many levels in strips, at the first level of its schedule.

    The seed is drawn from twice, as diffusers' pipelines do: for the sample of the encoder's distribution, and for the
    noise.
    """
    generator = torch.Generator("cpu").manual_seed(request.seed)
    spread, noise = (noise_of(generator, (1, *shape)).to(device) for _ in range(2))
    image = autoencoder.encode(canvas.pixels.to(device), spread, strip_levels)
    known = Known(image, noise, canvas.repaint(limits.latent_scale).to(device)) if has_mask(request) else None
    return Start(noised(image, noise, schedule(request)[0].item()), known)


def from_larger(
    request: ResolvedRequest, larger: Tensor, shape: Sequence[int], autoencoder: Autoencoder, strip_levels: int
) -> Start:
    """What a pass before left, enlarged to pixels (1, 3, H, W) or to latents of `shape`, at the first level of the
    request's schedule; the seed is drawn from as for an image."""
    generator = torch.Generator("cpu").manual_seed(request.seed)
    spread, noise = (noise_of(generator, (1, *shape)).to(larger.device) for _ in range(2))
    image = larger if larger.shape[1:] == tuple(shape) else autoencoder.encode(larger, spread, strip_levels)
    return Start(noised(image, noise, schedule(request)[0].item()))


def enlarged(values: Tensor, height: int, width: int) -> Tensor:
    """Pixels or latents (1, C, h, w) as (1, C, height, width) in float32, interpolated bicubically."""
    return torch.nn.functional.interpolate(values.float(), (height, width), mode="bicubic", align_corners=False)
