"""What images add to a request: the noise level that the picture starts from, what stays of the image, what steers it,
and sizes.

Plain arithmetic over sizes, no torch and no pixels: images are read in `files/images` and laid out in `canvas`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

from .arrays import plain
from .errors import RequestError
from .rules import Limits, flag, integer, number, shown

if TYPE_CHECKING:
    from .request import GenerationRequest

STRENGTH, STRENGTH_OF_MASKS = 0.6, 1.0
"""Where none is given: of diffusers' ZImageImg2ImgPipeline, and of its ZImageInpaintPipeline."""
CONTROL_SCALE, MAX_CONTROL_SCALE = 0.75, 2.0
"""How much of a ControlNet is added: by default as in diffusers' ZImageControlNetPipeline, and at most."""
MAX_CANVAS = 2**27
"""Pixels of an image with its padding: twice the largest image that is read."""
SIDES = ("left", "top", "right", "bottom")
"""The order of `padding`: Pillow's, as in its boxes and `ImageOps.expand`."""


@dataclass(frozen=True)
class SourceImage:
    """An image or a mask as it was read: its size in pixels, and the SHA-256 of its size and pixels, in hex.

    `pixels` is an array (height, width, 3) of bytes or of numbers in [0, 1], of a mask (height, width) of booleans,
    where True is to be repainted. It is `None` in a recipe, which knows an image by its digest.
    """

    width: int
    height: int
    digest: str
    pixels: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Editing:
    """What a request says about its images, with nothing left open; see `GenerationRequest`. Without them it says
    nothing: strength 1 starts from noise alone, and scale 0 is not steered."""

    image: SourceImage | None = None
    mask_image: SourceImage | None = None
    strength: float = 1.0
    keep_steps: bool = False
    padding: tuple[int, ...] = ()
    control_image: SourceImage | None = None
    controlnet_conditioning_scale: float = 0.0

    @property
    def canvas(self) -> tuple[int, int] | None:
        """Height and width of the image and what is added around it, or else of the control image."""
        source = self.image or self.control_image
        return None if source is None else canvas_size(source, self.padding)


def resolve_editing(request: GenerationRequest, limits: Limits) -> Editing:
    """What `request` asks of its images; raises `RequestError` for options that have no image, or that cannot work."""
    control, scale = _control(request)
    image, mask = _source("image", request.image), _source("mask_image", request.mask_image)
    if image is None:
        for name in ("mask_image", "strength", "padding", "keep_steps"):
            given = plain(getattr(request, name))
            if given is not None and given is not False:
                raise RequestError(f"{name} is about an image and none is given; pass image, or leave {name} out")
        return Editing(control_image=control, controlnet_conditioning_scale=scale)
    if request.latents is not None:
        raise RequestError(
            "image and latents are both given; a picture can start from one of them only. To noise an image "
            "repeatably, pass a seed"
        )
    if mask is not None and (mask.width, mask.height) != (image.width, image.height):
        raise RequestError(
            f"mask_image must have the size of image, {image.width}x{image.height}; it is {mask.width}x{mask.height}"
        )
    padding = _padding(request.padding, limits)
    height, width = canvas_size(image, padding)
    if height * width > MAX_CANVAS:
        raise RequestError(
            f"the image with its padding is {width}x{height}, {height * width / 1e6:.0f} megapixels; up to "
            f"{MAX_CANVAS / 1e6:.0f} are laid out, so take less padding"
        )
    usual = STRENGTH if mask is None and not padding else STRENGTH_OF_MASKS
    strength = number("strength", usual if request.strength is None else request.strength, 0.0, 1.0)
    if strength == 0:
        raise RequestError("strength must be above 0: with 0 the picture is the image; raise it, up to 1")
    keeps = flag("keep_steps", request.keep_steps) and strength < 1
    return Editing(
        image=image,
        mask_image=mask,
        strength=strength,
        keep_steps=keeps,
        padding=padding,
        control_image=control,
        controlnet_conditioning_scale=scale,
    )


def skipped_steps(steps: int, strength: float, keep_steps: bool) -> int:
    """How many of a schedule's `steps` an image is ahead of, in diffusers' arithmetic (`get_timesteps`)."""
    return 0 if keep_steps else int(max(steps - min(steps * strength, steps), 0))


def check_steps(steps: int, editing: Editing) -> None:
    """Raises `RequestError` where the strength is so low that no step is left."""
    if skipped_steps(steps, editing.strength, editing.keep_steps) == steps:
        raise RequestError(
            f"strength {editing.strength:g} leaves none of {steps} steps; raise it to {1 / steps:g}, or keep_steps=True"
        )


def canvas_size(image: SourceImage, padding: Sequence[int]) -> tuple[int, int]:
    """Height and width of an image with `padding` around it."""
    left, top, right, bottom = padding or (0, 0, 0, 0)
    return image.height + top + bottom, image.width + left + right


def _control(request: GenerationRequest) -> tuple[SourceImage | None, float]:
    """The control image and how much of it is added, 0 without one."""
    control, scale = _source("control_image", request.control_image), request.controlnet_conditioning_scale
    if control is None:
        if scale is not None:
            raise RequestError(
                "controlnet_conditioning_scale is about a control_image and none is given; pass control_image, or "
                "leave controlnet_conditioning_scale out"
            )
        return None, 0.0
    asked = CONTROL_SCALE if scale is None else scale
    return control, number("controlnet_conditioning_scale", asked, 0.0, MAX_CONTROL_SCALE)


def _source(name: str, value: Any) -> SourceImage | None:
    if value is not None and not isinstance(value, SourceImage):
        raise RequestError(
            f"{name} was not read yet, it is {shown(value)}; a pipeline's `resolve` reads it, and so do `read_image` "
            "and `read_mask` of zimage.files.images"
        )
    return value


def _padding(padding: int | Sequence[int] | None, limits: Limits) -> tuple[int, ...]:
    if padding is None:
        return ()
    asked = plain(padding)
    listed = [asked] * len(SIDES) if isinstance(asked, Integral) else asked
    if not isinstance(listed, list | tuple) or len(listed) != len(SIDES):
        raise RequestError(f"padding must be pixels on {', '.join(SIDES)}, or one number for all; got {shown(padding)}")
    pixels = tuple(
        integer(f"padding on the {side}", one, 0, limits.max_side) for side, one in zip(SIDES, listed, strict=True)
    )
    if not any(pixels):
        raise RequestError("padding is 0 on every side, which adds nothing; leave it out")
    return pixels
