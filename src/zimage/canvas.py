"""The canvas of a picture that starts from an image: the image as it was asked for, and where it is repainted; and the
image that steers it.

From a resolved request to pixels, and from a decoder's pixels to the picture: what is not repainted is put back, bit
for bit. Knows no models.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor

from .editing import SourceImage
from .errors import RequestError
from .request import ResolvedRequest
from .rules import Limits

Array = npt.NDArray[np.generic]

_MOST = 8
"""A scaled image of at most so many times the picture's pixels is made whole before it is cropped."""
_REACH = 4
"""Pixels around a part of an image that its enlargement depends on: Lanczos' three, and one for rounding."""


@dataclass(frozen=True)
class Canvas:
    """`pixels` (1, 3, H, W) in [0, 1], float32 on the CPU; `painted` and `added` (1, 1, H, W) are True under the mask's
    white, and in the padding."""

    pixels: Tensor
    painted: Tensor
    added: Tensor

    def repaint(self, scale: int) -> Tensor:
        """(1, 1, H / scale, W / scale): the latents that are repainted.

        Of the mask as in diffusers: where the upper left pixel of a latent's square is white. Of the padding any.
        """
        padding = F.max_pool2d(self.added.float(), scale) > 0
        return self.painted[:, :, ::scale, ::scale] | padding

    def cut_out(self) -> Tensor:
        """The pixels, grey where they are repainted: what a ControlNet is shown of an image."""
        return torch.where(self.painted | self.added, 0.5, self.pixels)

    def put_back(self, pixels: Tensor) -> Tensor:
        """`pixels` (1, 3, H, W) of a decoder with the canvas' own, bit for bit, where nothing is repainted."""
        repaint = (self.painted | self.added).to(pixels.device)
        return torch.where(repaint, pixels.float(), self.pixels.to(pixels.device))


def has_mask(request: ResolvedRequest) -> bool:
    """Whether parts of the image stay as they are."""
    return request.mask_image is not None or bool(request.padding)


def lay_out(request: ResolvedRequest, limits: Limits) -> Canvas:
    """The canvas of a request with an image, for a model with these `limits`.

    Padding repeats the image's edge. A canvas that is larger than the picture by less than a token is cropped evenly on
    both sides; otherwise it is scaled to cover the picture (Lanczos; masks by the nearest pixel) and then cropped. Of a
    canvas so thin that it would be very large then, only what stays is scaled.
    Raises `RequestError` if its mask is too thin to repaint anything.
    """
    image = _pixels("image", request.image)
    painted = np.zeros(image.shape[:2], dtype=bool)
    if request.mask_image is not None:
        painted = _pixels("mask_image", request.mask_image)
    added = np.zeros(image.shape[:2], dtype=bool)
    left, top, right, bottom = request.padding or (0, 0, 0, 0)
    around = (top, bottom), (left, right)
    image = np.pad(image, (*around, (0, 0)), mode="edge")
    painted, added = np.pad(painted, around), np.pad(added, around, constant_values=True)
    fitted, *masks = (
        _fit(part, request.height, request.width, limits.size_multiple) for part in (image, painted, added)
    )
    canvas = Canvas(
        _numbers(fitted),
        *(torch.from_numpy(mask.copy())[None, None] for mask in masks),
    )
    scale = limits.latent_scale
    if has_mask(request) and not canvas.repaint(scale).any():
        raise RequestError(
            f"what mask_image marks is too small to be repainted; it takes a square of {scale}x{scale} pixels"
        )
    return canvas


def lay_out_control(request: ResolvedRequest, limits: Limits) -> Tensor:
    """The pixels (1, 3, H, W) of a request's control image in [0, 1], fitted to the picture as images are."""
    pixels = _pixels("control_image", request.control_image)
    return _numbers(_fit(pixels, request.height, request.width, limits.size_multiple))


def _numbers(pixels: Array) -> Tensor:
    """(1, 3, H, W) in [0, 1], float32."""
    numbers = pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels
    return torch.from_numpy(np.moveaxis(numbers, -1, 0).copy())[None]


def _pixels(name: str, source: SourceImage | None) -> Array:
    if source is None or source.pixels is None:
        raise RequestError(f"{name} is known by its digest only, as a recipe has it; pass {name} itself")
    pixels: Array = source.pixels
    return pixels


def _fit(part: Array, height: int, width: int, token: int) -> Array:
    own_height, own_width = part.shape[:2]
    if 0 <= own_height - height < token and 0 <= own_width - width < token:
        return _middle(part, height, width)
    ratio = max(height / own_height, width / own_width)
    whole_height, whole_width = max(height, round(own_height * ratio)), max(width, round(own_width * ratio))
    if whole_height * whole_width <= max(own_height * own_width, _MOST * height * width):
        return _middle(_scaled(part, whole_height, whole_width), height, width)
    rows, top, bottom = _behind(own_height, whole_height, height)
    columns, left, right = _behind(own_width, whole_width, width)
    return _scaled(part[rows, columns], height, width, (left, top, right, bottom))


def _middle(part: Array, height: int, width: int) -> Array:
    top, left = (part.shape[0] - height) // 2, (part.shape[1] - width) // 2
    return part[top : top + height, left : left + width]


def _behind(own: int, whole: int, shown: int) -> tuple[slice, float, float]:
    """What the middle `shown` pixels depend on, of `own` pixels that are enlarged to `whole`; and where those begin and
    end in it."""
    begin = (whole - shown) // 2
    first, last = begin * own / whole, (begin + shown) * own / whole
    start, stop = max(0, floor(first) - _REACH), min(own, ceil(last) + _REACH)
    return slice(start, stop), first - start, last - start


def _scaled(part: Array, height: int, width: int, box: tuple[float, float, float, float] | None = None) -> Array:
    """`part`, or what is in its `box` (left, top, right, bottom), in this size."""

    def scale(pixels: Array, how: Image.Resampling = Image.Resampling.LANCZOS) -> Array:
        return np.asarray(Image.fromarray(pixels).resize((width, height), how, box))

    if part.dtype == np.bool_:
        return scale(part, Image.Resampling.NEAREST)
    if part.dtype == np.uint8:
        return scale(part)
    return np.clip(np.stack([scale(part[:, :, channel]) for channel in range(3)], axis=-1), 0, 1)
