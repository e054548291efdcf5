"""`zimage generate --lora` and the replay of what it drew, from the picture alone and from another place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from zimage import ZImagePipeline, read_recipe
from zimage.files.recipe import pixel_digest

SMALL = ("--size", "256", "--steps", "2", "--dtype", "float32", "--device", "cpu", "--seed", "7")


def write(path: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    stem = "diffusion_model.layers.0.attention.to_v"
    halves = {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4)}
    save_file({f"{stem}.{name}": torch.randn(shape, generator=generator) for name, shape in halves.items()}, path)
    return path


@pytest.fixture
def ink(tmp_path: Path) -> Path:
    return write(tmp_path / "ink.safetensors")


def test_a_lora_acts_and_is_told(zimage: Callable[..., Any], turbo: str, ink: Path) -> None:
    ended = zimage("generate", "a fox", "-m", turbo, *SMALL, "--lora", f"{ink}:0.5", "--lora", f"wash={ink}:0.25")
    assert (ended.code, ended.out) == (0, "zimage-7.png\n")
    assert ended.err == (
        "zimage: turbo, 2 steps, guidance 0, ink at 0.5, wash at 0.25, 256x256, seed 7, float32 on cpu\n"
    )
    pipe = ZImagePipeline.from_pretrained(turbo, dtype="float32", device="cpu")
    pipe.load_adapter(ink)
    pipe.load_adapter(ink, "wash")
    options: dict[str, Any] = {"seed": 7, "height": 256, "width": 256, "num_inference_steps": 2, "progress": False}
    expected = pipe("a fox", **options, adapters={"ink": 0.5, "wash": 0.25}).images[0]  # type: ignore[union-attr]
    assert pixel_digest(Image.open("zimage-7.png")) == pixel_digest(expected)
    assert read_recipe("zimage-7.png").adapters == expected.recipe.adapters
    ended = zimage("replay", "zimage-7.png", "--json", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    report = json.loads(ended.out)
    assert report["same_bits"] is True
    assert report["request"]["adapters"] == [["ink", 0.5], ["wash", 0.25]]


def test_a_lora_that_moved_is_named(zimage: Callable[..., Any], turbo: str, ink: Path, tmp_path: Path) -> None:
    assert zimage("generate", "a fox", "-m", turbo, *SMALL, "--lora", ink).code == 0
    moved = tmp_path / "elsewhere.safetensors"
    shutil.move(ink, moved)
    ended = zimage("replay", "zimage-7.png")
    assert ended.code == 1
    assert "cannot find the LoRA" in ended.err
    assert "the file names this adapter: pass --lora ink=SOURCE" in ended.err
    ended = zimage("replay", "zimage-7.png", "--lora", f"ink={moved}", "--quiet")
    assert (ended.code, ended.out) == (0, "same bits\n")
    write(moved, seed=1)
    ended = zimage("replay", "zimage-7.png", "--lora", f"ink={moved}", "--quiet")
    assert ended.code == 1
    assert "which is another file here (SHA-256" in ended.err
    for wrong in (f"wash={moved}", moved, f"ink={moved}:0.5"):
        ended = zimage("replay", "zimage-7.png", "--lora", wrong)
        assert ended.code == 2
        assert "--lora here is NAME=SOURCE, of an adapter that the file names (ink)" in ended.err


def test_a_lora_with_a_version_in_its_name_can_move(
    zimage: Callable[..., Any], turbo: str, ink: Path, tmp_path: Path
) -> None:
    shutil.move(ink, named := tmp_path / "Ink v1.5.safetensors")
    assert zimage("generate", "a fox", "-m", turbo, *SMALL, "--lora", named).code == 0
    shutil.move(named, ink)
    assert "pass --lora 'Ink v1.5=SOURCE'" in zimage("replay", "zimage-7.png").err
    ended = zimage("replay", "zimage-7.png", "--lora", f"Ink v1.5={ink}", "--quiet")
    assert (ended.code, ended.out) == (0, "same bits\n")


def test_a_file_cannot_name_an_adapter_on_another_machine(
    zimage: Callable[..., Any], turbo: str, ink: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zimage import runtime

    monkeypatch.setattr(runtime, "portable_path", lambda path: f"//server/{path.name}" if path == ink else str(path))
    assert zimage("generate", "a fox", "-m", turbo, *SMALL, "--lora", ink).code == 0
    ended = zimage("replay", "zimage-7.png", "-m", turbo)
    assert ended.code == 2
    assert "the file names an adapter on another machine, //server/ink.safetensors; pass --lora" in ended.err


def test_a_lora_that_does_not_fit_is_one_line(zimage: Callable[..., Any], turbo: str, tmp_path: Path) -> None:
    file = tmp_path / "flux.safetensors"
    save_file({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 3072)}, file)
    ended = zimage("generate", "a fox", "-m", turbo, *SMALL, "--lora", file)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.count("\n") == 1
    assert "it looks like one for Flux; take a LoRA for Z-Image" in ended.err
