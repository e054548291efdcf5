"""The small models that come with the package: their files are pinned and they load by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest

import zimage
from zimage import ZImagePipeline, read_recipe

FOLDER = Path(zimage.__file__).parent / "demo"
MOST_BYTES = 16 * 10**6
DIGESTS = {
    "demo": "23d9f8fb901e04138da735f19b4c25278e880a34d66b8947f0f8b41600d2cd80",
    "demo-turbo": "cf96056ae9591f580cc4ea42e13f9f202a05fcded39697816f2eedcf4ce4bc20",
}
"""SHA-256 over the names and contents of all files."""


@pytest.fixture(scope="module")
def demo() -> ZImagePipeline:
    return ZImagePipeline.from_pretrained("demo", dtype="float32", device="cpu")


@pytest.mark.parametrize("name", DIGESTS)
def test_the_files_are_those_that_were_measured(name: str) -> None:
    digest = hashlib.sha256()
    for file in sorted(path for path in (FOLDER / name).rglob("*") if path.is_file()):
        digest.update(file.relative_to(FOLDER).as_posix().encode() + b"\0" + file.read_bytes())
    assert digest.hexdigest() == DIGESTS[name]


def test_they_are_small(tmp_path: Path) -> None:
    """As a wheel packs them, one file at a time."""
    with ZipFile(tmp_path / "models.zip", "w", ZIP_DEFLATED) as packed:
        for file in FOLDER.rglob("*"):
            packed.write(file, file.relative_to(FOLDER))
    assert (tmp_path / "models.zip").stat().st_size <= MOST_BYTES


def test_text_encoder_and_autoencoder_are_the_same_in_both() -> None:
    for name in (
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer.json",
    ):
        assert (FOLDER / "demo" / name).read_bytes() == (FOLDER / "demo-turbo" / name).read_bytes()


def test_it_loads_by_name_with_its_own_size_and_recipe(demo: ZImagePipeline) -> None:
    request = demo.resolve(zimage.GenerationRequest("a red circle"))
    assert (request.variant, request.width, request.height) == ("base", 128, 128)
    assert (request.num_inference_steps, request.guidance_scale) == (50, 2.0)  # which it names itself
    assert demo.model["source"] == "demo"
    assert demo.model["fingerprint"]


def test_turbo_has_the_recipe_of_a_turbo() -> None:
    pipe = ZImagePipeline.from_pretrained("demo-turbo", device="cpu")
    request = pipe.resolve(zimage.GenerationRequest("a red circle"))
    assert (request.variant, request.width, request.height) == ("turbo", 128, 128)
    assert (request.num_inference_steps, request.guidance_scale, request.shift) == (8, 0.0, 3.0)
    assert request.sampler == "dpmpp_2m"  # what it says itself that it is best drawn with


def test_a_name_means_the_demo_even_where_a_folder_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ZImagePipeline.from_pretrained("demo", device="cpu").variant.name == "base"


def test_a_picture_of_it_is_replayed_from_its_file(demo: ZImagePipeline, tmp_path: Path) -> None:
    image = demo("a blue square", seed=3, num_inference_steps=4, progress=False).images[0]
    image.save(tmp_path / "square.png")
    assert read_recipe(tmp_path / "square.png").model["source"] == "demo"
    assert demo.replay(tmp_path / "square.png").same_bits
