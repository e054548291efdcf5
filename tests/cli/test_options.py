import inspect
import io
import shutil
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
    check_request,
    chosen_model,
    known_variant,
    read_normalization,
    read_prompt,
    read_size,
)
from zimage.errors import CheckpointError, RequestError
from zimage.request import GenerationRequest
from zimage.variants import BASE, TURBO, Variant

NOT_ON_A_COMMAND_LINE = {"sigmas", "latents", "prompt_embeds", "negative_prompt_embeds"}
OF_THE_COMMAND = {"model", "size", "num_images_per_prompt", "output", "no_recipe", "force", "json", "quiet"}


def test_options_are_the_requests_fields_and_the_loaders_arguments() -> None:
    options = set(inspect.signature(generate).parameters)
    request = {field.name for field in fields(GenerationRequest)} - NOT_ON_A_COMMAND_LINE
    loading = set(inspect.signature(ZImagePipeline.from_pretrained).parameters)
    assert request <= options
    assert options - request - OF_THE_COMMAND <= loading
    assert {"dtype", "device", "variant", "revision", "cache_dir", "local_files_only"} <= options


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


def cached(cache: Path, variant: Variant, checkpoint: Path) -> None:
    repository = cache / f"models--{variant.hub_id.replace('/', '--')}"
    shutil.copytree(checkpoint, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


@pytest.mark.parametrize("model", [None, ""])
def test_no_model_is_one_in_the_cache_or_the_demo(
    model: str | None, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chosen_model(model, tmp_path) == "demo"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "demo, a small one that knows coloured shapes only; --model base or turbo downloads" in said
    cached(tmp_path, BASE, models / "my-base")
    assert chosen_model(model, tmp_path) == "base"
    cached(tmp_path, TURBO, models / "my-turbo")
    assert chosen_model(model, tmp_path) == "turbo"
    assert capsys.readouterr().err.endswith("zimage: no model was named: turbo, which is in the cache\n")
    (next(tmp_path.glob("*Turbo*/snapshots/*")) / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert chosen_model(model, tmp_path) == "base"  # what was downloaded in part does not count
    assert chosen_model("./folder", tmp_path) == "./folder"


def test_the_variant_is_known_from_names() -> None:
    assert known_variant("turbo", None) == TURBO
    assert known_variant("Tongyi-MAI/Z-Image", None) == BASE
    assert known_variant("./folder", "base") == BASE
    assert known_variant("./folder", None) is None
    assert known_variant("demo", None) == BASE
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
