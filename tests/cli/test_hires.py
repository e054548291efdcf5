"""`zimage generate --hires`: the picture, what is said about it, and options that cannot work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SIZE = ("--size", "96x64", "--any-size", "--seed", "3", "--steps", "4")


def test_a_second_pass(zimage: Callable[..., Any], turbo: str, tmp_path: Path) -> None:
    file = tmp_path / "fox.png"
    how = ("--hires", "1.5", "--hires-strength", "0.5", "--hires-upscale", "latents")
    done = zimage("generate", "a fox", "--model", turbo, *SIZE, *how, "--output", file, "--json")
    assert done.code == 0, done.err
    assert "96x64, 1.5 times as large at strength 0.5, seed 3" in done.err
    report = json.loads(done.out)
    assert report["request"]["hires"] == {"scale": 1.5, "strength": 0.5, "upscale": "latents"}
    assert report["evaluations"] == 6
    with Image.open(file) as made:
        assert made.size == (144, 96)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--hires-strength", "0.5"), "--hires-strength is about a second pass; add --hires 2, or leave it out"),
        (("--hires", "9"), "hires: its scale must be a number from 1 to 4"),
        (("--hires", "2", "--hires-upscale", "lanczos"), "its upscale must be pixels or latents"),
    ],
)
def test_what_cannot_work(
    zimage: Callable[..., Any], turbo: str, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = zimage("generate", "a fox", "--model", turbo, *SIZE, *options, "--output", tmp_path / "fox.png")
    assert done.code == 2
    assert said in done.err
    assert not list(tmp_path.iterdir())
