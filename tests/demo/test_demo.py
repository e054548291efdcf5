"""The small models that come with the package: their files are pinned and they load by name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import zimage
from zimage import ZImagePipeline, read_recipe

FOLDER = Path(zimage.__file__).parent / "demo"
MOST_BYTES = 16 * 10**6
DIGESTS = {
    "demo": "729721ce45d79aa3b8f1d264b9db18672cf59b5383c7f1a1c3edf605acd0f42e",
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


def test_they_are_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= MOST_BYTES


def test_it_loads_by_name_with_its_own_size_and_recipe(demo: ZImagePipeline) -> None:
    request = demo.resolve(zimage.GenerationRequest("a red circle"))
    assert (request.variant, request.width, request.height) == ("base", 128, 128)
    assert (request.num_inference_steps, request.guidance_scale) == (50, 4.0)
    assert demo.model["source"] == "demo"
    assert demo.model["fingerprint"]


def test_a_name_means_the_demo_even_where_a_folder_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ZImagePipeline.from_pretrained("demo", device="cpu").variant.name == "base"


def test_a_picture_of_it_is_replayed_from_its_file(demo: ZImagePipeline, tmp_path: Path) -> None:
    image = demo("a blue square", seed=3, num_inference_steps=4, progress=False).images[0]
    image.save(tmp_path / "square.png")
    assert read_recipe(tmp_path / "square.png").model["source"] == "demo"
    assert demo.replay(tmp_path / "square.png").same_bits
