"""`zimage generate --controlnet` and the replay of what it drew, from the picture and its control image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zimage import ZImagePipeline, read_recipe
from zimage.files.recipe import pixel_digest
from zimage.testing import build_controlnet

SMALL = ("--steps", "2", "--dtype", "float32", "--device", "cpu", "--seed", "7")


@pytest.fixture
def edges(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 272, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "edges.png")
    return tmp_path / "edges.png"


def test_it_steers_and_is_replayed(zimage: Callable[..., Any], turbo: str, edges: Path, tmp_path: Path) -> None:
    net = build_controlnet(tmp_path / "net.safetensors")
    asked = ("--controlnet", net, "--control-image", edges, "--control-scale", "0.5")
    ended = zimage("generate", "a fox", "-m", turbo, *SMALL, *asked)
    assert (ended.code, ended.out) == (0, "zimage-7.png\n")
    assert ended.err == "zimage: turbo, 2 steps, steered at 0.5, guidance 0, 272x256, seed 7, float32 on cpu\n"
    pipe = ZImagePipeline.from_pretrained(turbo, dtype="float32", device="cpu", controlnet=net)
    options: dict[str, Any] = {"control_image": edges, "controlnet_conditioning_scale": 0.5, "num_inference_steps": 2}
    expected = pipe("a fox", seed=7, progress=False, **options).images[0]  # type: ignore[union-attr]
    assert pixel_digest(Image.open("zimage-7.png")) == pixel_digest(expected)
    assert read_recipe("zimage-7.png").controlnet == expected.recipe.controlnet
    ended = zimage("replay", "zimage-7.png", "--control-image", edges, "--json", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out)["same_bits"] is True
    ended = zimage("replay", "zimage-7.png")
    assert ended.code == 2
    assert "pass --control-image" in ended.err
    moved = shutil.move(net, tmp_path / "elsewhere.safetensors")
    ended = zimage("replay", "zimage-7.png", "--control-image", edges)
    assert ended.code == 1
    assert "the file names this ControlNet: pass --controlnet SOURCE" in ended.err
    ended = zimage("replay", "zimage-7.png", "--control-image", edges, "--controlnet", moved, "-q")
    assert (ended.code, ended.out) == (0, "same bits\n")


def test_a_control_image_needs_one(zimage: Callable[..., Any], edges: Path) -> None:
    ended = zimage("generate", "a fox", "-m", "./nothing", "--control-image", edges)
    assert ended.code == 2
    assert "--control-image needs a ControlNet; name one with --controlnet" in ended.err
    ended = zimage("generate", "a fox", "-m", "./nothing", "--controlnet", "net")
    assert (ended.code, ended.out) == (2, "")
    assert "--controlnet follows a --control-image; pass --control-image, or leave --controlnet out" in ended.err
