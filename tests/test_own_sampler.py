"""A checkpoint that names the sampler it is best drawn with: pictures that ask for none are drawn by it, wherever the
model comes from and goes to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from zimage import (
    CheckpointError,
    GenerationRequest,
    Relay,
    RequestError,
    ZImagePipeline,
    convert_checkpoint,
)
from zimage.bench.settings import Settings
from zimage.checkpoint.configs import SAMPLER_KEY, SCHEDULER
from zimage.checkpoint.inspect import inspect_checkpoint
from zimage.cli import main
from zimage.files.recipe import pixel_digest
from zimage.testing import build_checkpoint
from zimage.variants import TURBO

OWN = "dpmpp_2m"


def name_sampler(folder: Path, sampler: Any) -> Path:
    """Write `sampler` into the checkpoint in `folder`."""
    config = json.loads((folder / SCHEDULER).read_text())
    (folder / SCHEDULER).write_text(json.dumps(config | {SAMPLER_KEY: sampler}))
    return folder


def load(folder: str | Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")


def digest(pipe: ZImagePipeline, **options: Any) -> str:
    """Of one small picture."""
    return pixel_digest(pipe("a fox", 64, 64, 4, any_size=True, seed=7, progress=False, **options).images[0])


@pytest.fixture(scope="module")
def folder(turbo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("own") / "model"
    shutil.copytree(turbo_folder, copy)
    return name_sampler(copy, OWN)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> ZImagePipeline:
    return load(folder)


def test_pictures_that_ask_for_none_are_drawn_by_it(pipe: ZImagePipeline, turbo: ZImagePipeline) -> None:
    assert (pipe.variant.name, pipe.variant.sampler, turbo.variant.sampler) == ("turbo", OWN, "euler")
    assert digest(pipe) == digest(turbo, sampler=OWN) != digest(turbo)
    assert digest(pipe, sampler="euler") == digest(turbo)


def test_the_recipe_names_it(pipe: ZImagePipeline, turbo: ZImagePipeline, tmp_path: Path) -> None:
    """So another model of the variant draws the picture again by it."""
    image = pipe("a fox", 64, 64, 4, any_size=True, seed=7, progress=False).images[0]
    image.save(tmp_path / "fox.png")
    assert pipe.replay(tmp_path / "fox.png").same_bits
    assert turbo.replay(tmp_path / "fox.png").same_bits


def saved(pipe: ZImagePipeline, target: Path) -> ZImagePipeline:
    pipe.save_pretrained(target)
    return load(target)


def converted(pipe: ZImagePipeline, target: Path) -> ZImagePipeline:
    assert pipe._folder is not None
    convert_checkpoint(pipe._folder, target)
    return load(target)


def through_diffusers(pipe: ZImagePipeline, target: Path) -> ZImagePipeline:
    return ZImagePipeline.from_diffusers(pipe.to_diffusers())


def saved_by_diffusers(pipe: ZImagePipeline, target: Path) -> ZImagePipeline:
    """Loaded and saved there, where nothing knows the key."""
    theirs = diffusers.ZImagePipeline.from_pretrained(pipe._folder, local_files_only=True)
    theirs.save_pretrained(target)
    return load(target)


WAYS = (saved, converted, through_diffusers, saved_by_diffusers)


@pytest.mark.parametrize("way", WAYS)
def test_it_goes_where_the_model_goes(
    way: Callable[[ZImagePipeline, Path], ZImagePipeline], pipe: ZImagePipeline, tmp_path: Path
) -> None:
    assert way(pipe, tmp_path / "model").variant.sampler == OWN


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_names_none_names_none_afterwards(
    way: Callable[[ZImagePipeline, Path], ZImagePipeline], turbo: ZImagePipeline, tmp_path: Path
) -> None:
    gone = way(turbo, tmp_path / "model")
    assert gone.variant == TURBO
    if gone._folder is not None:
        assert SAMPLER_KEY not in json.loads((gone._folder / SCHEDULER).read_text())


def test_one_can_be_said_where_a_pipeline_is_made(turbo: ZImagePipeline) -> None:
    theirs = turbo.to_diffusers()
    parts = {name: getattr(theirs, name) for name in ("vae", "text_encoder", "tokenizer", "transformer")}
    assert ZImagePipeline(3.0, **parts, sampler="heun").variant.sampler == "heun"
    with pytest.raises(RequestError, match=r"sampler must be one of euler, heun, dpmpp_2m, got 'ddim'"):
        ZImagePipeline(3.0, **parts, sampler="ddim")


@pytest.mark.parametrize("sampler", ["ddim", 2, ["euler"]])
def test_one_that_there_is_not_is_refused(sampler: Any, folder: Path, tmp_path: Path) -> None:
    """Before anything is loaded, as is all else that a config may not say."""
    shutil.copytree(folder, tmp_path / "model")
    name_sampler(tmp_path / "model", sampler)
    with pytest.raises(CheckpointError, match="_sampler must be 'euler' or 'heun' or 'dpmpp_2m', got"):
        load(tmp_path / "model")


def test_inspect_tells_it(folder: Path, turbo_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for one, sampler, told in ((folder, OWN, f"(shift 3, sampler {OWN})"), (turbo_folder, None, "(shift 3)")):
        assert inspect_checkpoint(one).sampler == sampler
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(one)])
        assert not ended.value.code
        assert capsys.readouterr().out.startswith(f"variant: turbo {told}\n")


def test_in_a_relay_each_model_has_its_own(folder: Path, tmp_path: Path) -> None:
    base = build_checkpoint(tmp_path / "base", variant="base")
    relay = Relay.from_pretrained(base, folder, dtype="float32", device="cpu")
    request = relay.resolve(GenerationRequest("a fox", height=64, width=64, any_size=True, sampler="heun"))
    assert (request.base.sampler, request.turbo.sampler) == ("heun", OWN)
    assert (relay.base.variant.sampler, relay.turbo.variant.sampler) == ("euler", OWN)


def test_the_bench_draws_as_diffusers_does(pipe: ZImagePipeline) -> None:
    assert pipe.resolve(Settings(model="demo-turbo").request(pipe.variant)).sampler == "euler"
