"""A checkpoint that names the sampler or the guidance it is best drawn with: pictures that ask for none are drawn so,
wherever the model comes from and goes to."""

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
from zimage.checkpoint.configs import SCHEDULER
from zimage.checkpoint.inspect import inspect_checkpoint
from zimage.cli import main
from zimage.files.recipe import pixel_digest
from zimage.own import KEYS
from zimage.testing import build_checkpoint
from zimage.variants import BASE

OWN: dict[str, Any] = {"sampler": "dpmpp_2m", "guidance_scale": 2.5}


def name(folder: Path, **own: Any) -> Path:
    """Write `own` into the checkpoint in `folder`."""
    config = json.loads((folder / SCHEDULER).read_text())
    (folder / SCHEDULER).write_text(json.dumps(config | {KEYS[option]: value for option, value in own.items()}))
    return folder


def copied(source: Path, target: Path, **own: Any) -> Path:
    """A checkpoint like `source` that names `own`."""
    shutil.copytree(source, target)
    return name(target, **own)


def load(folder: str | Path, **options: Any) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, dtype="float32", device="cpu", **options)


def own_of(pipe: ZImagePipeline) -> dict[str, Any]:
    return {option: getattr(pipe.variant, option) for option in KEYS}


def parts_of(pipe: ZImagePipeline) -> dict[str, Any]:
    """What a pipeline is put together from, but for the scheduler."""
    theirs = pipe.to_diffusers()
    return {part: getattr(theirs, part) for part in ("vae", "text_encoder", "tokenizer", "transformer")}


def digest(pipe: ZImagePipeline, **options: Any) -> str:
    """Of one small picture."""
    return pixel_digest(pipe("a fox", 64, 64, 4, any_size=True, seed=7, progress=False, **options).images[0])


@pytest.fixture(scope="module")
def folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(base_folder, tmp_path_factory.mktemp("own") / "model", **OWN)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> ZImagePipeline:
    return load(folder)


def test_pictures_that_ask_for_none_are_drawn_so(pipe: ZImagePipeline, base: ZImagePipeline) -> None:
    assert (pipe.variant.name, own_of(pipe)) == ("base", OWN)
    assert own_of(base) == {"sampler": "euler", "guidance_scale": 4.0}
    own = digest(pipe)
    assert own == digest(base, **OWN)
    assert own not in (digest(base, sampler=OWN["sampler"]), digest(base, guidance_scale=OWN["guidance_scale"]))
    assert digest(pipe, sampler="euler", guidance_scale=4.0) == digest(base)


def test_the_recipe_names_it(pipe: ZImagePipeline, base: ZImagePipeline, tmp_path: Path) -> None:
    """So another model of the variant draws the picture again by it."""
    image = pipe("a fox", 64, 64, 4, any_size=True, seed=7, progress=False).images[0]
    image.save(tmp_path / "fox.png")
    assert pipe.replay(tmp_path / "fox.png").same_bits
    assert base.replay(tmp_path / "fox.png").same_bits


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
    assert own_of(way(pipe, tmp_path / "model")) == OWN


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_names_none_names_none_afterwards(
    way: Callable[[ZImagePipeline, Path], ZImagePipeline], base: ZImagePipeline, tmp_path: Path
) -> None:
    gone = way(base, tmp_path / "model")
    assert gone.variant == BASE
    if gone._folder is not None:
        assert not set(KEYS.values()) & set(json.loads((gone._folder / SCHEDULER).read_text()))


def test_it_can_be_said_where_a_pipeline_is_made(pipe: ZImagePipeline) -> None:
    """Each instead of what the scheduler's config names."""
    parts, named = parts_of(pipe), pipe.to_diffusers().scheduler
    assert own_of(ZImagePipeline(named, **parts, sampler="heun")) == {**OWN, "sampler": "heun"}
    assert own_of(ZImagePipeline(named, **parts, guidance_scale=3)) == {**OWN, "guidance_scale": 3.0}
    with pytest.raises(RequestError, match=r"sampler must be one of euler, heun, dpmpp_2m, got 'ddim'"):
        ZImagePipeline(6.0, **parts, sampler="ddim")
    with pytest.raises(RequestError, match=r"guidance_scale must be a number from 0 up, got int -1"):
        ZImagePipeline(6.0, **parts, guidance_scale=-1)


def test_a_base_model_may_name_no_guidance(base: ZImagePipeline) -> None:
    pipe = ZImagePipeline(6.0, **parts_of(base), guidance_scale=0)
    assert (pipe.variant.guidance_scale, pipe.variant.evaluations, pipe.variant.supports_guidance) == (0.0, 50, True)
    assert pipe.resolve(Settings(model="demo").request(pipe.variant)).negative_prompt == ""
    assert pipe.resolve(GenerationRequest("a", negative_prompt="b", guidance_scale=1)).guidance_scale == 1.0
    with pytest.raises(RequestError, match="no effect on Z-Image without guidance; raise guidance_scale above 0"):
        pipe.resolve(GenerationRequest("a", negative_prompt="b"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("sampler", value) for value in ("ddim", 2, ["euler"])),
        *(("guidance_scale", value) for value in ("2", True, -1, None, 10**400)),
    ],
)
def test_one_that_there_is_not_is_refused(option: str, value: Any, folder: Path, tmp_path: Path) -> None:
    """Before anything is loaded, as is all else that a config may not say."""
    wanted = {"sampler": "'euler' or 'heun' or 'dpmpp_2m'", "guidance_scale": "a number from 0 up"}[option]
    with pytest.raises(CheckpointError, match=f"_{option} must be {wanted}, got"):
        load(copied(folder, tmp_path / "model", **{option: value}))


def test_guidance_of_a_turbo_is_refused(
    turbo_folder: Path, base_folder: Path, turbo: ZImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights are read, unless it is said to be a base model; `inspect` tells it beforehand."""
    said = (
        "Z-Image-Turbo must name guidance 0 or none, got 2: .*; take _guidance_scale out of its scheduler_config.json"
    )
    folder = copied(turbo_folder, tmp_path / "model", guidance_scale=2)
    with pytest.raises(CheckpointError, match=said):
        ZImagePipeline(3.0, **parts_of(turbo), guidance_scale=2)
    assert load(folder, variant="base").variant.guidance_scale == 2.0
    with monkeypatch.context() as unread:
        for module in ("zimage.parts", "zimage.pairing"):
            unread.delattr(f"{module}.load_components")
        with pytest.raises(CheckpointError, match=said):
            load(folder)
        with pytest.raises(CheckpointError, match=said):
            Relay.from_pretrained(base_folder, folder, dtype="float32", device="cpu")
    found = inspect_checkpoint(folder)
    assert (found.variant, len(found.problems)) == ("turbo", 1)
    assert "Z-Image-Turbo must name guidance 0 or none" in found.problems[0]
    assert load(name(folder, guidance_scale=0)).variant == turbo.variant


def test_inspect_tells_it(folder: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = dict.fromkeys(KEYS)
    for one, own, told in ((folder, OWN, ", sampler dpmpp_2m, guidance 2.5"), (base_folder, nothing, "")):
        assert own.items() <= inspect_checkpoint(one).to_dict().items()
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(one)])
        assert not ended.value.code
        assert capsys.readouterr().out.startswith(f"variant: base (shift 6{told})\n")


def test_in_a_relay_each_model_has_its_own(folder: Path, tmp_path: Path) -> None:
    turbo = name(build_checkpoint(tmp_path / "turbo", variant="turbo"), sampler="heun")
    relay = Relay.from_pretrained(folder, turbo, dtype="float32", device="cpu")
    assert (own_of(relay.base), relay.turbo.variant.sampler) == (OWN, "heun")
    request = relay.resolve(GenerationRequest("a fox", height=64, width=64, any_size=True))
    assert (request.base.sampler, request.base.guidance_scale) == ("dpmpp_2m", 2.5)
    assert (request.turbo.sampler, request.turbo.guidance_scale) == ("heun", 0.0)


def test_the_bench_draws_as_diffusers_does(pipe: ZImagePipeline) -> None:
    assert pipe.resolve(Settings(model="demo").request(pipe.variant)).sampler == "euler"
