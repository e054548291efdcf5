"""A saved picture is made again from its file alone, and the pipeline says whether it is the same, bit for bit."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageEnhance
from PIL.PngImagePlugin import PngInfo

import zimage
from zimage import GenerationRequest, Recipe, RequestError, ZImagePipeline, read_recipe
from zimage.files.recipe import pixel_digest


@pytest.fixture
def saved(turbo: ZImagePipeline, small: dict[str, Any], tmp_path: Path) -> Path:
    turbo("a fox", **small, seed=7).images[0].save(tmp_path / "fox.png")
    return tmp_path / "fox.png"


def with_recipe(picture: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a PNG with its recipe's JSON changed."""
    with Image.open(picture) as image:
        document = json.loads(image.text["zimage"])
        change(document)
        chunks = PngInfo()
        chunks.add_itxt("zimage", json.dumps(document))
        image.save(picture.with_name("changed.png"), pnginfo=chunks)
    return picture.with_name("changed.png")


def test_every_saved_picture_carries_its_recipe(base: ZImagePipeline, small: dict[str, Any], tmp_path: Path) -> None:
    output = base(["a fox", "狐狸"], **small, negative_prompt="blurry", seed=7, num_images_per_prompt=2)
    for index, (image, request) in enumerate(zip(output.images, output.requests, strict=True)):
        file = tmp_path / f"{index}.png"
        image.save(file)
        recipe = read_recipe(file)
        assert recipe.request == request
        assert recipe == image.recipe
        with Image.open(file) as opened:
            assert recipe.pixels == pixel_digest(opened) == pixel_digest(image)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png", "3.png"]


def test_a_recipe_says_with_what_it_was_made(turbo: ZImagePipeline, turbo_folder: Path, saved: Path) -> None:
    recipe = read_recipe(saved)
    assert recipe.model == {
        "source": str(turbo_folder),
        "revision": "",
        "variant": "turbo",
        "fingerprint": turbo.model["fingerprint"],
        "transformer": "",
        "text_encoder": "",
        "vae": "",
    }
    assert json.loads(recipe.to_json())["model"].keys() == recipe.model.keys() - {"text_encoder", "vae"}
    assert len(recipe.model["fingerprint"]) > 10
    assert recipe.runtime["zimage"] == zimage.__version__
    assert recipe.runtime["torch"] == torch.__version__
    assert (recipe.runtime["dtype"], recipe.runtime["device"]) == ("float32", "cpu")
    assert recipe.runtime["threads"] == str(torch.get_num_threads())


def test_a_replay_gives_the_same_bits(turbo: ZImagePipeline, saved: Path, tmp_path: Path) -> None:
    for picture in (saved, str(saved), read_recipe(saved)):
        replay = turbo.replay(picture)
        assert replay.same_bits
        assert replay.differences == ()
        assert replay.request == read_recipe(saved).request
        assert pixel_digest(replay.image) == read_recipe(saved).pixels
    replay.image.save(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == saved.read_bytes()


def test_every_option_of_a_request_is_replayed(base: ZImagePipeline, small: dict[str, Any]) -> None:
    options: dict[str, Any] = {
        "negative_prompt": "blurry\n模糊",
        "guidance_scale": 2.5,
        "cfg_normalization": 0.7,
        "cfg_truncation": 0.9,
        "sampler": "dpmpp_2m",
        "sigmas": [1.0, 0.8, 0.7, 0.1 + 0.2],
        "cache": [0, 1, 2],
        "max_sequence_length": 24,
        "diversity": 1.5,
    }
    size = {**small, "num_inference_steps": None}
    image = base("two\nlines of text", **size, **options, seed=2**32 - 1).images[0]
    del options["cache"]
    plain = base("two\nlines of text", **size, **options, seed=2**32 - 1).images[0]
    assert pixel_digest(image) != pixel_digest(plain)
    file = io.BytesIO()
    image.save(file, "PNG")
    assert base.replay(read_recipe(file)).same_bits


def test_a_model_that_takes_more_is_replayed_and_one_that_takes_less_refuses(
    turbo: ZImagePipeline, turbo_folder: Path, small: dict[str, Any], tmp_path: Path
) -> None:
    wide = shutil.copytree(turbo_folder, tmp_path / "wide")
    config = wide / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "axes_lens": [4096, 2048, 2048]}))
    pipe = ZImagePipeline.from_pretrained(wide, dtype="float32", device="cpu")
    pipe("a fox", **small, seed=7, max_sequence_length=2000).images[0].save(tmp_path / "long.png")
    assert pipe.replay(tmp_path / "long.png").same_bits
    with pytest.raises(RequestError, match="max_sequence_length must be a whole number from 1 to 1504, got 2000"):
        turbo.replay(tmp_path / "long.png")
    with pytest.raises(RequestError, match="height must be a whole number from 1 to 8192, got 16384"):
        turbo.replay(with_recipe(tmp_path / "long.png", lambda document: document["request"].update(height=16384)))


def test_altered_pixels_are_not_the_same(turbo: ZImagePipeline, saved: Path) -> None:
    """The recipe still makes its own picture; that is not the one whose digest the file claims."""
    digest = read_recipe(saved).pixels
    flipped = ("0" if digest[0] != "0" else "1") + digest[1:]
    replay = turbo.replay(with_recipe(saved, lambda document: document.update(pixels=flipped)))
    assert not replay.same_bits
    assert replay.differences == ()
    assert pixel_digest(replay.image) == digest
    edited = ImageEnhance.Brightness(turbo.replay(saved).image).enhance(1.5)
    assert pixel_digest(edited) != digest


def test_an_altered_request_is_another_picture(turbo: ZImagePipeline, saved: Path) -> None:
    replay = turbo.replay(with_recipe(saved, lambda document: document["request"].update(seed=8)))
    assert (replay.same_bits, replay.request.seed) == (False, 8)


def test_another_precision_is_named(turbo_folder: Path, saved: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(turbo_folder, dtype="bfloat16", device="cpu")
    replay = pipe.replay(saved)
    assert not replay.same_bits
    assert replay.differences == ("dtype was float32, here it is bfloat16",)


def test_what_else_differs_is_named(turbo: ZImagePipeline, saved: Path) -> None:
    """Differences that change no bits are told too, and the bits are what counts."""

    def older(document: dict[str, Any]) -> None:
        document["runtime"].update(torch="1.0.0", threads="64")
        document["model"].update(source="someone/else", fingerprint="")

    replay = turbo.replay(with_recipe(saved, older))
    assert replay.same_bits
    assert replay.differences == (
        f"model source was someone/else, here it is {turbo.model['source']}",
        f"torch was 1.0.0, here it is {torch.__version__}",
        f"threads was 64, here it is {torch.get_num_threads()}",
    )


def test_other_weights_are_named(turbo: ZImagePipeline, saved: Path, tmp_path: Path) -> None:
    from zimage.testing import build_checkpoint

    pipe = ZImagePipeline.from_pretrained(build_checkpoint(tmp_path / "other", seed=1), dtype="float32", device="cpu")
    replay = pipe.replay(saved)
    assert not replay.same_bits
    assert [sentence.split(" was ")[0] for sentence in replay.differences] == ["model source", "model fingerprint"]


def test_the_same_weights_elsewhere_are_the_same(turbo: ZImagePipeline, saved: Path, tmp_path: Path) -> None:
    turbo.save_pretrained(tmp_path / "copy")
    pipe = ZImagePipeline.from_pretrained(tmp_path / "copy", dtype="float32", device="cpu")
    replay = pipe.replay(saved)
    assert replay.same_bits
    assert replay.differences == ()


def test_a_recipe_of_the_other_model_is_refused(base: ZImagePipeline, saved: Path) -> None:
    with pytest.raises(RequestError, match="resolved for turbo, the pipeline holds base"):
        base.replay(saved)


def test_a_picture_can_be_saved_without_its_recipe(
    turbo: ZImagePipeline, small: dict[str, Any], tmp_path: Path
) -> None:
    image = turbo("a fox", **small, seed=7, embed_recipe=False).images[0]
    assert image.recipe is None
    image.save(tmp_path / "fox.png")
    assert b"a fox" not in (tmp_path / "fox.png").read_bytes()
    with pytest.raises(RequestError, match="has no zimage recipe"):
        turbo.replay(tmp_path / "fox.png")
    with Image.open(tmp_path / "fox.png") as opened:
        assert pixel_digest(opened) == pixel_digest(turbo("a fox", **small, seed=7).images[0])


def test_a_picture_from_given_tensors_says_so(turbo: ZImagePipeline, small: dict[str, Any], tmp_path: Path) -> None:
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(7))
    turbo("a fox", **small, latents=noise).images[0].save(tmp_path / "fox.png")
    assert read_recipe(tmp_path / "fox.png").given == ("latents",)
    with pytest.raises(RequestError, match=r"its recipe does not hold \(latents\), given to the call or changed"):
        turbo.replay(tmp_path / "fox.png")


def test_a_recipe_can_be_made_for_any_image(turbo: ZImagePipeline, small: dict[str, Any]) -> None:
    output = turbo("a fox", **small, seed=7)
    recipe = turbo.recipe(output.requests[0], output.images[0])
    assert recipe == output.images[0].recipe == Recipe.from_json(recipe.to_json())
    assert not turbo.replay(replace(recipe, pixels="0" * 64)).same_bits
    with pytest.raises(RequestError, match="request must be a resolved one, from an output's `requests` or `resolve`"):
        turbo.recipe(GenerationRequest("a fox"), output.images[0])  # type: ignore[arg-type]


def test_a_replay_in_a_new_process_gives_the_same_bits(saved: Path, run_python: Callable[..., str]) -> None:
    """From the file alone: it names its model."""
    code = f"""
import sys, torch
torch.set_num_threads({torch.get_num_threads()})
from zimage import ZImagePipeline, read_recipe
recipe = read_recipe(sys.argv[1])
pipe = ZImagePipeline.from_pretrained(recipe.model["source"], dtype=recipe.runtime["dtype"], device="cpu")
replay = pipe.replay(sys.argv[1])
print(replay.same_bits, replay.differences)
"""
    assert run_python(code, saved) == "True ()\n"
