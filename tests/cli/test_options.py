import inspect
import io
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main

from zimage import ZImagePipeline
from zimage.cli import app
from zimage.cli.generate import generate
from zimage.cli.options import (
    MAX_PROMPT_BYTES,
    MODEL_HELP,
    Choice,
    check_request,
    choose_model,
    known_variant,
    read_images,
    read_loras,
    read_normalization,
    read_padding,
    read_prompt,
    read_size,
)
from zimage.errors import CheckpointError, RequestError
from zimage.request import GenerationRequest
from zimage.variants import BASE, DEMOS, TURBO, VARIANTS

from .conftest import cached

NOT_ON_A_COMMAND_LINE = {"sigmas", "latents", "prompt_embeds", "negative_prompt_embeds"}
TEMPLATES = {"prompts", "expand", "pick", "wildcards"}
HIRES = {"hires_strength", "hires_upscale"}
"""Which say how `hires` is meant, one value in Python."""
OF_THE_COMMAND = TEMPLATES | HIRES | {"model", "size", "num_images_per_prompt", "output"}
OF_THE_COMMAND |= {"no_recipe", "force", "json", "quiet"}


def test_options_are_the_requests_fields_and_the_loaders_arguments() -> None:
    options = set(inspect.signature(generate).parameters)
    request = {field.name for field in fields(GenerationRequest)} - NOT_ON_A_COMMAND_LINE
    loading = set(inspect.signature(ZImagePipeline.from_pretrained).parameters)
    assert request <= options
    assert options - request - OF_THE_COMMAND <= loading
    assert {"dtype", "device", "memory", "variant", "revision", "cache_dir", "local_files_only"} <= options


def test_every_option_has_its_python_name_and_no_default() -> None:
    command = typer.main.get_command(app).commands["generate"]  # type: ignore[attr-defined]
    for option in command.params:
        assert option.default in (None, False), option.name
        if option.name not in ("prompt", "help"):
            assert "--" + option.name.replace("_", "-") in option.opts, option.name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), {}),
        ((None, 512, None), {"height": 512}),
        ((None, 512, 768), {"height": 512, "width": 768}),
        (("1280x720", None, None), {"width": 1280, "height": 720}),
        ((" 1280 X 720 ", None, None), {"width": 1280, "height": 720}),
        (("1280×720", None, None), {"width": 1280, "height": 720}),
        (("1024", None, None), {"width": 1024, "height": 1024}),
    ],
)
def test_size(given: tuple[Any, ...], expected: dict[str, int]) -> None:
    assert read_size(*given) == expected


@pytest.mark.parametrize("size", ["", "x", "1024x", "x1024", "1x2x3", "-16", "1024.0", "1e3", "٣٢", "9999999"])
def test_size_that_is_none(size: str) -> None:
    with pytest.raises(RequestError, match="--size must be WIDTHxHEIGHT"):
        read_size(size, None, None)


def test_size_is_given_once() -> None:
    with pytest.raises(RequestError, match="leave --height and --width out"):
        read_size("1024", 512, None)


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("true", True), ("False", False), ("1", 1.0), ("0.5", 0.5)]
)
def test_normalization(text: str | None, expected: float | bool | None) -> None:
    found = read_normalization(text)
    assert found == expected
    assert type(found) is type(expected)


def test_normalization_that_is_none() -> None:
    with pytest.raises(RequestError, match="true, false or a number, got 'yes'"):
        read_normalization("yes")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ink.safetensors", ("ink.safetensors", None, None)),
        ("ink.safetensors:0.8", ("ink.safetensors", None, 0.8)),
        ("ink.safetensors:-1", ("ink.safetensors", None, -1.0)),
        ("wash=a folder/ink.safetensors:.5", ("a folder/ink.safetensors", "wash", 0.5)),
        (r"C:\loras\ink.safetensors", (r"C:\loras\ink.safetensors", None, None)),
        ("owner/name:2", ("owner/name", None, 2.0)),
        ("Ink v1.5=ink.safetensors:2", ("ink.safetensors", "Ink v1.5", 2.0)),
        ("loras/rank=8.safetensors", ("loras/rank=8.safetensors", None, None)),
        ("a:b", ("a:b", None, None)),
    ],
)
def test_loras(text: str, expected: tuple[str, str | None, float | None]) -> None:
    (lora,) = read_loras([text])
    assert (lora.source, lora.name, lora.strength) == expected
    assert read_loras(None) == []


@pytest.mark.parametrize("text", ["", "a\nb"])
def test_loras_that_are_none(text: str) -> None:
    with pytest.raises(RequestError, match=r"--lora must be \[NAME=\]SOURCE\[:STRENGTH\]"):
        read_loras([text])


def piped(data: bytes, tty: bool = False) -> Any:
    return SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: tty)


@pytest.mark.parametrize(
    ("argument", "stdin", "expected"),
    [
        ("a fox", b"other", "a fox"),
        ("", b"other", ""),
        ("-", "ein Füchslein\n".encode(), "ein Füchslein"),
        (None, b"two\nlines\r\n", "two\nlines"),
        (None, b"\xef\xbb\xbfa fox", "a fox"),
        (None, b" kept  as it is ", " kept  as it is "),
    ],
)
def test_prompt(monkeypatch: pytest.MonkeyPatch, argument: str | None, stdin: bytes, expected: str) -> None:
    monkeypatch.setattr(sys, "stdin", piped(stdin))
    assert read_prompt(argument) == expected


@pytest.mark.parametrize(
    ("argument", "stdin", "said"),
    [
        (None, piped(b"", tty=True), "no prompt: pass one in quotes"),
        (None, None, "no prompt: pass one in quotes"),
        (None, piped(b""), "stdin is empty"),
        ("-", piped(b" \n"), "stdin is empty"),
        ("-", piped(b"\xff\xfe"), "not valid UTF-8"),
        ("\udcff", piped(b""), "not valid UTF-8"),
        ("-", piped(b"x" * (MAX_PROMPT_BYTES + 1)), "longer than"),
    ],
)
def test_prompt_that_is_none(monkeypatch: pytest.MonkeyPatch, argument: str | None, stdin: Any, said: str) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(RequestError, match=said):
        read_prompt(argument)


def chosen(cache: Path, model: str | None = None, **options: Any) -> str:
    return choose_model(model, cache_dir=cache, **options).model


@pytest.mark.parametrize("model", [None, ""])
def test_no_model_is_one_in_the_cache_or_a_demo(model: str | None, tmp_path: Path, models: Path) -> None:
    choice = choose_model(model, cache_dir=tmp_path)
    assert (choice.model, choice.is_there) == ("demo", True)
    assert "demo, a small one that knows coloured shapes only; --model base or turbo downloads" in choice.notice
    cached(tmp_path, BASE, models / "my-base")
    assert chosen(tmp_path, model) == "base"
    cached(tmp_path, TURBO, models / "my-turbo")
    choice = choose_model(model, cache_dir=tmp_path)
    assert choice.notice == "no model was named: turbo, which is in the cache"
    assert choice.is_there
    assert chosen(tmp_path, model, variant="base") == "base"
    snapshot = next(tmp_path.glob("*Turbo*/snapshots/*"))
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert chosen(tmp_path, model) == "base"  # what was downloaded in part does not count
    assert choose_model("./folder", cache_dir=tmp_path) == Choice(model="./folder")
    assert not choose_model("turbo", cache_dir=tmp_path).is_there


def test_a_cache_that_cannot_be_read_holds_no_model(tmp_path: Path, models: Path) -> None:
    cached(tmp_path, BASE, models / "my-base")
    (next(tmp_path.glob("*")) / "refs" / "main").write_bytes(b"\xff" * 40)
    assert chosen(tmp_path) == "demo"


def test_a_variant_chooses_between_the_demos(tmp_path: Path) -> None:
    assert chosen(tmp_path, variant="base") == "demo"
    choice = choose_model(None, variant="turbo", cache_dir=tmp_path)
    assert choice.model == "demo-turbo"
    assert "demo-turbo, a small one that knows coloured shapes only; --model turbo downloads" in choice.notice


def test_what_no_model_here_can_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--revision is of a model on the hub: name it with --model"):
        choose_model(None, revision="main", cache_dir=tmp_path)
    with pytest.raises(RequestError, match="variant must be one of base, turbo"):
        choose_model(None, variant="flux", cache_dir=tmp_path)


def test_the_help_names_every_model_that_has_a_name() -> None:
    assert MODEL_HELP.split(", ") == [*VARIANTS, *DEMOS, "a hub id or a folder."]


def test_the_variant_is_known_from_names() -> None:
    assert known_variant("turbo", None) == TURBO
    assert known_variant("Tongyi-MAI/Z-Image", None) == BASE
    assert known_variant("./folder", "base") == BASE
    assert known_variant("./folder", None) is None
    assert known_variant("demo", None) == BASE
    assert known_variant("demo-turbo", None) == TURBO
    with pytest.raises(RequestError, match="variant must be one of"):
        known_variant("./folder", "flux")
    with pytest.raises(CheckpointError, match="is Z-Image-Turbo"):
        known_variant("turbo", "base")


def test_requests_are_checked_as_far_as_the_variant_is_known() -> None:
    guided = GenerationRequest("a fox", guidance_scale=3)
    check_request(guided, "base", None)
    check_request(guided, "./folder", None)
    for model, variant in (("turbo", None), ("Tongyi-MAI/Z-Image-Turbo", None), ("./folder", "turbo")):
        with pytest.raises(RequestError, match="must be 0 for Z-Image-Turbo"):
            check_request(guided, model, variant)
    with pytest.raises(RequestError, match="multiple of 16"):
        check_request(GenerationRequest("a fox", height=1000), "./folder", None)
    small = GenerationRequest("a fox", height=128, width=128)
    check_request(small, "./folder", "turbo")
    for model in ("base", "Tongyi-MAI/Z-Image"):
        with pytest.raises(RequestError, match="128x128 is"):
            check_request(small, model, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, None), ("64,0,32,8", [64, 0, 32, 8]), (" 64, 0 ,32,8", [64, 0, 32, 8]), ("16", [16] * 4)],
)
def test_padding(text: str | None, expected: list[int] | None) -> None:
    assert read_padding(text) == expected


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3", "1,2,3,4,5", "-1", "1.5", "x", "1,,2,3"])
def test_padding_that_is_none(text: str) -> None:
    with pytest.raises(RequestError, match="--padding must be left,top,right,bottom"):
        read_padding(text)


def test_images_are_read_before_a_model_is_loaded(tmp_path: Path) -> None:
    assert read_images(None, None) == {}
    with pytest.raises(RequestError, match="there is no file"):
        read_images(tmp_path / "none.png", None)
