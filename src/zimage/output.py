"""What a call hands back: pictures with their requests, steps of a stream, a replay's verdict. Plain containers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import RequestError
from .files.png import Picture
from .hires import demands
from .request import ResolvedRequest

if TYPE_CHECKING:
    from PIL import Image

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True, eq=False)
class ZImageOutput:
    """`images` as `output_type` asked: a list of PIL pictures ("pil"), an array (B, H, W, 3) in [0, 1] ("np"), a tensor
    (B, 3, H, W) in [0, 1] ("pt") or latents (B, 16, H/8, W/8) ("latent"); `requests[k]` makes image k again.

    `stepped_down` says for each time that memory ran out meanwhile what is done with less since."""

    images: Any
    requests: tuple[ResolvedRequest, ...]
    stepped_down: tuple[str, ...] = ()

    def __getitem__(self, index: int) -> Any:
        """diffusers' outputs can be indexed like the tuple that `return_dict=False` gives."""
        return (self.images,)[index]


@dataclass(frozen=True, eq=False)
class Step:
    """One denoising step of a stream, done.

    `latents` (1, 16, H/8, W/8) are now at `sigma_next`; `denoised` is the picture expected from `sigma`, also as
    latents. `image` is the finished picture on the last step and `None` before; `preview()` makes a cheap one of
    `denoised` at any. Tensors are the run's own: copy them before changing them.
    """

    index: int
    total: int
    sigma: float
    sigma_next: float
    latents: Tensor = field(repr=False)
    denoised: Tensor = field(repr=False)
    request: ResolvedRequest
    image: Image.Image | None = None
    previewer: Callable[[Tensor], Image.Image] | None = field(default=None, repr=False)

    def preview(self) -> Image.Image:
        """A small picture of what is expected now, a pixel for each 8 x 8, or what `set_preview` chose.

        Raises `RequestError` for a step that was pickled or copied, which leaves its pipeline behind.
        """
        if self.previewer is None:
            raise RequestError(
                "this step has no pipeline to make a preview with, as one that was pickled or copied has none; pass "
                "its denoised to a pipeline's preview"
            )
        return self.previewer(self.denoised)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "previewer": None}


@dataclass(frozen=True)
class Drawn:
    """One picture of many: `index` counts them from 0, `request` makes it again.

    `stepped_down` says for each time that memory ran out since the picture before what is done with less since.
    """

    index: int
    image: Picture
    request: ResolvedRequest
    stepped_down: tuple[str, ...] = ()


@dataclass(frozen=True)
class Replay:
    """A picture made again: whether its pixels are the recorded ones, and what is not as it was then."""

    image: Picture
    request: ResolvedRequest
    same_bits: bool
    differences: tuple[str, ...]


def check_output_type(output_type: str) -> str:
    """`output_type`, if there is such a type; raises `RequestError` otherwise."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise RequestError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    return output_type


def check_stackable(requests: Sequence[ResolvedRequest], output_type: str) -> None:
    """Raises `RequestError` where images of several sizes should become one array."""
    if output_type != "pil" and len({demands(request)[:2] for request in requests}) > 1:
        raise RequestError(f"output_type={output_type!r} needs images of one size; use 'pil', or a call for each size")


def collect(images: Sequence[Any], output_type: str) -> Any:
    """The images of a call in the container of `output_type`."""
    if output_type == "pil":
        return list(images)
    stacked = torch.cat(list(images))
    return _to_numpy(stacked) if output_type == "np" else stacked


def _to_numpy(pixels: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return pixels.permute(0, 2, 3, 1).float().cpu().numpy()
