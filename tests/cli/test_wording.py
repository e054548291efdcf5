"""What the library says of its parameters is said of the command's options; all else in a message stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from zimage.cli.wording import as_options

OPTIONS = {
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "mask_image": "--mask",
    "any_size": "--any-size",
    "text_encoder": "--text-encoder",
    "model": "--model",
    "variant": "--variant",
    "image": "--image",
    "strength": "--strength",
    "size": "--size",
}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("num_inference_steps must be 1 or more, got 0", "--steps must be 1 or more, got 0"),
        ("leave it out, or lower guidance_scale", "leave it out, or lower --guidance"),
        ("strength must be a number, got 2", "--strength must be a number, got 2"),
        (
            "strength is lost; pass image, or leave strength out",
            "--strength is lost; pass --image, or leave --strength out",
        ),
        ("mask_image must have the size of image, 64x64", "--mask must have the size of image, 64x64"),
        ("choose another, or pass any_size=True", "choose another, or pass --any-size"),
        ("say which: variant='base' or variant='turbo'", "say which: --variant base or --variant turbo"),
        ("the folder exists; overwrite=True replaces it", "the folder exists; --force replaces it"),
    ],
)
def test_parameters_become_options(said: str, wanted: str) -> None:
    assert as_options(said, OPTIONS) == wanted


@pytest.mark.parametrize(
    "said",
    [
        "the image has another size; a strength of 1 is as large as the model",
        "/home/me/mask_image.png is no image that can be read",
        "/home/me/guidance_scale/config.json is damaged",
        "text_encoder/config.json is missing; model must be a folder with text_encoder in it",
        "my_guidance_scale and guidance_scale_2 are no options of a call",
        "the recipe's height must be a multiple of 16",
        "--any-size takes no value; --image must be a file",
        "relay.image must be given; pass image of a mask",
        "image-to-image must be asked for",
    ],
)
def test_all_else_stays(said: str) -> None:
    assert as_options(said, OPTIONS) == said


def test_options_that_a_command_has_not_are_not_named() -> None:
    said = "num_inference_steps must be 1 or more; any_size=True"
    assert as_options(said, {}) == said
    assert as_options(said, {"any_size": "--any-size"}) == "num_inference_steps must be 1 or more; --any-size"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "fox", "--model", "base", "--steps", "0"), "zimage: --steps must be a whole number from 1"),
        (("generate", "fox", "--model", "turbo", "--mask", "mask.png"), "pass --image, or leave --mask out"),
        (("generate", "fox", "--model", "turbo", "--strength", "0.5"), "pass --image, or leave --strength out"),
        (("generate", "fox", "--model", "turbo", "--size", "250"), "zimage: --size must be a multiple of 16, got 250"),
        (("generate", "fox", "--model", "turbo", "--height", "250"), "zimage: --height must be a multiple of 16"),
        (("plan", "--size", "512x250"), "zimage: --size must be a multiple of 16, got 250"),
        (("bench", "--height", "1000"), "zimage: --height must be a multiple of 16"),
        (("plan", "--model", "turbo", "--memory", "lots"), "zimage: --memory must be 'auto'"),
    ],
)
def test_commands_speak_of_their_own(
    zimage: Callable[..., Any], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    ended = zimage(*arguments)
    assert ended.code == 2
    assert said in ended.err
