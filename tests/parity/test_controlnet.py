"""Pictures that a ControlNet steers have the latents of diffusers' two pipelines to 1e-5 in float32, for the same seed.

Of each version that is published, from a folder and from a single file, with guidance and without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from diffusers import ZImageControlNetInpaintPipeline, ZImageControlNetModel, ZImageControlNetPipeline
from PIL import Image
from torch import Tensor

from zimage import ZImagePipeline
from zimage.testing import build_controlnet

if TYPE_CHECKING:
    from conftest import Pair, Pairs

TOLERANCE = 1e-5
HEIGHT, WIDTH = 80, 112
PROMPT = "a photo of a red fox sitting in the snow"
VERSIONS = ("1.0", "2.0", "2.1")

Nets = Callable[..., tuple[Path, Any]]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def ellipse() -> Image.Image:
    """A mask whose edge keeps to no grid."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    inside = ((rows - 37) / 27) ** 2 + ((columns - 61) / 38) ** 2 < 1
    return Image.fromarray((255 * inside).astype(np.uint8))


EDIT = {"image": picture(1), "mask_image": ellipse()}


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    """The folder of a version, and diffusers' model of it."""

    @cache
    def build(version: str, dtype: torch.dtype) -> tuple[Path, Any]:
        folder = build_controlnet(tmp_path_factory.mktemp("nets") / version, version=version)  # type: ignore[arg-type]
        return folder, ZImageControlNetModel.from_pretrained(folder, torch_dtype=dtype)

    return build


def run(
    pair: Pair, nets: Nets, version: str, *, theirs: dict[str, Any] | None = None, net: Any = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Latents of either side for one control image and one seed; `theirs` are arguments that differ."""
    folder, controlnet = nets(version, pair.ours.dtype)
    ours = ZImagePipeline.from_diffusers(pair.theirs, variant=pair.ours.variant.name)
    ours.load_controlnet(folder if net is None else net)
    asked = {"control_image": picture(0), "num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "latent"}
    asked |= options
    if asked["guidance_scale"]:
        asked |= {"negative_prompt": "blurry, low quality, watermark " * 6}
    made = ours(PROMPT, seed=3, any_size=True, progress=False, **asked)
    kind = ZImageControlNetInpaintPipeline if "mask_image" in asked else ZImageControlNetPipeline
    pipe = kind(**pair.theirs.components, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return made.images, pipe(PROMPT, height=HEIGHT, width=WIDTH, generator=generator, **asked | (theirs or {})).images


def error(latents: tuple[Tensor, Tensor]) -> float:
    """Largest difference, relative to the largest value."""
    ours, theirs = latents
    assert ours.shape == theirs.shape == (1, 16, HEIGHT // 8, WIDTH // 8)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("guidance", [0.0, 4.0])
@pytest.mark.parametrize("version", VERSIONS)
def test_from_noise(pairs: Pairs, nets: Nets, version: str, guidance: float) -> None:
    assert error(run(pairs("base"), nets, version, guidance_scale=guidance)) <= TOLERANCE


@pytest.mark.parametrize("guidance", [0.0, 4.0])
@pytest.mark.parametrize("version", VERSIONS[1:])
def test_inpainting(pairs: Pairs, nets: Nets, version: str, guidance: float) -> None:
    assert error(run(pairs("base"), nets, version, guidance_scale=guidance, **EDIT)) <= TOLERANCE


@pytest.mark.parametrize(("scale", "edit"), [(0.0, {}), (0.0, EDIT), (0.3, EDIT), (1.0, {}), (2.0, EDIT)])
def test_scales(pairs: Pairs, nets: Nets, scale: float, edit: dict[str, Any]) -> None:
    assert error(run(pairs("turbo"), nets, "2.1", controlnet_conditioning_scale=scale, **edit)) <= TOLERANCE


@pytest.mark.parametrize("version", VERSIONS)
def test_from_a_published_file(pairs: Pairs, nets: Nets, version: str, tmp_path: Path) -> None:
    """Which has no config, and of 2.0 blocks that nobody uses; diffusers reads the folder."""
    file = build_controlnet(tmp_path / "Union.safetensors", version=version)  # type: ignore[arg-type]
    assert error(run(pairs("turbo"), nets, version, net=file)) <= TOLERANCE


def test_the_scale_that_is_not_given_is_theirs(pairs: Pairs, nets: Nets) -> None:
    same = {"controlnet_conditioning_scale": 0.75}
    assert error(run(pairs("turbo"), nets, "2.1", theirs=same)) <= TOLERANCE


def test_guidance_that_is_cut_off_and_capped(pairs: Pairs, nets: Nets) -> None:
    options = {"guidance_scale": 4.0, "cfg_truncation": 0.4, "cfg_normalization": 0.8}
    assert error(run(pairs("base"), nets, "2.1", **options, **EDIT)) <= TOLERANCE


@pytest.mark.parametrize("edit", [{}, EDIT], ids=["noise", "mask"])
def test_in_bfloat16_neither_is_nearer_to_float32(pairs: Pairs, nets: Nets, edit: dict[str, Any]) -> None:
    ours, theirs = run(pairs("turbo", torch.bfloat16), nets, "2.1", **edit)
    _, reference = run(pairs("turbo"), nets, "2.1", **edit)
    distances = [(one.float() - reference).norm() / reference.norm() for one in (ours, theirs)]
    assert distances[0] <= 1.5 * distances[1] < 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"controlnet_conditioning_scale": 0.74},
        {"control_image": Image.fromarray(np.asarray(picture(0)) ^ np.uint8(1))},
        {"mask_image": ellipse().transpose(Image.Transpose.FLIP_LEFT_RIGHT)},
        {"image": picture(2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_tolerance_would_show_a_difference(pairs: Pairs, nets: Nets, change: dict[str, Any]) -> None:
    original = {"control_image": picture(0), "controlnet_conditioning_scale": 0.75, **EDIT}
    assert error(run(pairs("turbo"), nets, "2.1", **{**EDIT, **change}, theirs=original)) > 10 * TOLERANCE
