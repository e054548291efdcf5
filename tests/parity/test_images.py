"""Image-to-image and inpainting in float32 give the latents of diffusers' pipelines to 1e-5, for the same seed.

Either side samples the encoder's distribution and the noise from a generator of the seed, in that order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from conftest import Pair, Pairs

TOLERANCE = 1e-5
HEIGHT, WIDTH = 80, 112
PROMPT = "a photo of a red fox sitting in the snow"
STRENGTHS = [0.1, 0.3, 0.6, 0.75, 1.0]
STEPS = 4


def picture() -> Image.Image:
    """Smooth colours with some noise, so that no pixel is like its neighbours."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [127 + 90 * np.sin(rows / 9 + phase) * np.cos(columns / 13 - phase) for phase in (0, 1, 2)]
    noise = np.random.default_rng(0).normal(0, 12, (HEIGHT, WIDTH, 3))
    return Image.fromarray(np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8))


def ellipse() -> Image.Image:
    """A mask whose edge keeps to no grid."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    inside = ((rows - 37) / 27) ** 2 + ((columns - 61) / 38) ** 2 < 1
    return Image.fromarray((255 * inside).astype(np.uint8))


def run(
    pair: Pair, *, guidance: float = 0.0, theirs: dict[str, Any] | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Latents of either side from one image and one seed; `theirs` are arguments that differ."""
    shared = {"image": picture(), "num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "latent"}
    shared |= options
    ours = pair.ours(PROMPT, seed=3, any_size=True, progress=False, **shared)
    pipe = (ZImageInpaintPipeline if "mask_image" in shared else ZImageImg2ImgPipeline)(**pair.theirs.components)
    pipe.set_progress_bar_config(disable=True)
    shared.pop("keep_steps", None)
    return ours.images, pipe(PROMPT, generator=torch.Generator().manual_seed(3), **shared | (theirs or {})).images


def error(latents: tuple[Tensor, Tensor]) -> float:
    """Largest difference, relative to the largest value."""
    ours, theirs = latents
    assert ours.shape == theirs.shape == (1, 16, HEIGHT // 8, WIDTH // 8)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(params=["turbo", "base"])
def pair(request: pytest.FixtureRequest, pairs: Pairs) -> Pair:
    found: Pair = pairs(request.param)
    return found


def guided(pair: Pair) -> dict[str, Any]:
    is_base = pair.ours.variant.supports_guidance
    return {"guidance": 4.0, "negative_prompt": "blurry", "cfg_normalization": 0.8} if is_base else {}


@pytest.mark.parametrize("strength", STRENGTHS)
def test_image_to_image(pair: Pair, strength: float) -> None:
    assert error(run(pair, strength=strength, **guided(pair))) <= TOLERANCE


@pytest.mark.parametrize("strength", STRENGTHS)
def test_inpainting(pair: Pair, strength: float) -> None:
    assert error(run(pair, strength=strength, mask_image=ellipse(), **guided(pair))) <= TOLERANCE


@pytest.mark.parametrize("mask", [{}, {"mask_image": ellipse()}], ids=["image", "mask"])
def test_the_strength_that_is_not_given_is_theirs(pairs: Pairs, mask: dict[str, Any]) -> None:
    assert error(run(pairs("turbo"), **mask)) <= TOLERANCE


@pytest.mark.parametrize("mask", [{}, {"mask_image": ellipse()}], ids=["image", "mask"])
def test_given_sigmas(pairs: Pairs, mask: dict[str, Any]) -> None:
    assert error(run(pairs("base"), strength=0.6, sigmas=[1.0, 0.7, 0.2, 0.05], **mask)) <= TOLERANCE


@pytest.mark.parametrize("mask", [{}, {"mask_image": ellipse()}], ids=["image", "mask"])
def test_kept_steps_are_the_whole_schedule_below_the_strength(pairs: Pairs, mask: dict[str, Any]) -> None:
    """diffusers has no such option; it runs these sigmas from their first."""
    lower = {"strength": 1.0, "sigmas": [0.3, 0.225, 0.15, 0.075]}
    assert error(run(pairs("turbo"), strength=0.3, keep_steps=True, theirs=lower, **mask)) <= TOLERANCE


@pytest.mark.parametrize("mask", [{}, {"mask_image": ellipse()}], ids=["image", "mask"])
def test_arrays_and_tensors(pairs: Pairs, mask: dict[str, Any]) -> None:
    numbers = np.asarray(picture()).astype(np.float32) / 255
    tensor = torch.from_numpy(numbers).movedim(-1, 0)[None]
    for image in (numbers[None], tensor):
        assert error(run(pairs("turbo"), image=image, strength=0.6, **mask)) <= TOLERANCE


def test_pixels_of_image_to_image(pairs: Pairs) -> None:
    ours, theirs = run(pairs("turbo"), strength=0.6, output_type="np")
    assert ours.shape == (1, HEIGHT, WIDTH, 3)
    assert np.abs(ours - theirs).max() <= 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"strength": 0.5},
        {"image": Image.fromarray(np.asarray(picture()) ^ np.uint8(1))},
        {"mask_image": ellipse().transpose(Image.Transpose.FLIP_LEFT_RIGHT)},
        {"keep_steps": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_tolerance_would_show_a_difference(pairs: Pairs, change: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"strength": 0.75, "mask_image": ellipse()}
    assert error(run(pairs("turbo"), **asked | change, theirs={"image": picture(), **asked})) > 100 * TOLERANCE
