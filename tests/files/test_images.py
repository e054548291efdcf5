"""Images come from anywhere: whatever holds one gives the same pixels, and what is none is a `RequestError`."""

from __future__ import annotations

import io
import os
import re
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from zimage.editing import SourceImage
from zimage.errors import RequestError
from zimage.files.images import READERS, read_image, read_mask
from zimage.files.png import read_recipe
from zimage.files.recipe import pixel_digest

BYTES = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
PICTURE = Image.fromarray(BYTES)


CLOSED = io.BytesIO()
CLOSED.close()


def saved(folder: Path, name: str, image: Image.Image = PICTURE, **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


class Trickling(io.RawIOBase):
    """A pipe: it cannot go back, and gives a little at a time."""

    def __init__(self, content: bytes) -> None:
        self.rest = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self.rest.read(min(size, 50))


def in_memory(path: Path) -> list[Any]:
    content = path.read_bytes()
    file = io.BytesIO(content)
    file.seek(9)
    return [content, bytearray(content), memoryview(content), Trickling(content), file]


def test_every_way_to_hand_in_bytes_gives_the_same_image(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.png")
    tensor = torch.from_numpy(BYTES.copy()).movedim(-1, 0)
    ways = [PICTURE, path, str(path), BYTES, BYTES[None], tensor, tensor[None], Image.open(path), *in_memory(path)]
    sources = [read_image(way) for way in ways]
    assert read_image(ways[-1]) == sources[0]  # a file is read from its beginning, again too
    assert {source.digest for source in sources} == {pixel_digest(PICTURE)}
    for source in sources:
        assert (source.width, source.height) == (7, 5)
        assert source.pixels.dtype == np.uint8
        assert np.array_equal(source.pixels, BYTES)
    assert read_image(sources[0]) is sources[0]


def test_the_image_is_a_copy_that_stays(tmp_path: Path) -> None:
    array = BYTES.copy()
    source = read_image(array)
    array[:] = 0
    assert np.array_equal(source.pixels, BYTES)
    with pytest.raises(ValueError, match="read-only"):
        source.pixels[:] = 0


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.ppm", "a.webp"])
def test_formats_without_loss(tmp_path: Path, name: str) -> None:
    options = {"lossless": True} if name.endswith("webp") else {}
    assert read_image(saved(tmp_path, name, **options)) == read_image(PICTURE)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_numbers_stay_numbers(kind: torch.dtype) -> None:
    numbers = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(kind)
    source = read_image(numbers)
    assert source.pixels.dtype == np.float32
    assert np.array_equal(source.pixels, numbers.float().movedim(0, -1).numpy())
    assert source == read_image(numbers.float().movedim(0, -1).numpy())
    assert source != read_image((numbers * 0.99).clamp(0, 1))
    leaf = torch.rand(3, 5, 7, requires_grad=True)
    assert read_image(leaf).width == 7


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_modes_of_pillow(mode: str) -> None:
    through = {"PA": "LA", "La": "LA", "RGBa": "RGBA"}.get(mode)
    image = PICTURE if through is None else PICTURE.convert(through)
    image = image.convert(mode)
    source = read_image(image)
    assert source.pixels.shape == (5, 7, 3)
    grey = mode in ("1", "L", "LA", "PA", "La")
    reference = np.asarray(PICTURE.convert("1" if mode == "1" else "L").convert("RGB")) if grey else BYTES
    lossy = {"P": 60, "YCbCr": 3, "HSV": 12, "PA": 60}.get(mode, 0)
    assert np.abs(source.pixels.astype(int) - reference).max() <= lossy


def test_sixteen_bits_are_not_cut_off() -> None:
    deep = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    for image in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        assert image.mode in ("I;16", "I")
        source = read_image(image)
        np.testing.assert_allclose(source.pixels[0, :, 1], [0, 1 / 255, 32768 / 65535, 1], atol=1e-7)
    with pytest.raises(RequestError, match="values from 0 to 65536, and its mode is for 0 to 65535"):
        read_image(Image.fromarray(np.array([[0, 65536]], dtype=np.int32)))


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    alpha = np.array([[255, 0, 128]], dtype=np.uint8)
    layered = np.concatenate([np.full((1, 3, 3), 10, dtype=np.uint8), alpha[:, :, None]], axis=2)
    assert read_image(Image.fromarray(layered)).pixels[0, :, 0].tolist() == [10, 255, 132]
    assert read_image(layered) == read_image(Image.fromarray(layered))
    floats = read_image(layered / np.float32(255)).pixels[0, :, 0] * 255
    np.testing.assert_allclose(floats, [10, 255, 132], atol=0.5)
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    path = saved(tmp_path, "p.png", palette, transparency=0)
    assert read_image(path).pixels[0, 0].tolist() == [255, 255, 255]


def test_orientation_is_followed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter, clockwise
    for name in ("a.png", "a.tiff"):
        source = read_image(saved(tmp_path, name, exif=exif))
        assert (source.width, source.height) == (5, 7)
        assert np.array_equal(source.pixels, np.rot90(BYTES, -1))
    assert read_mask(saved(tmp_path, "m.png", exif=exif)).width == 5


@pytest.mark.parametrize("kind", ["L", "1", "RGB", "bytes", "bool", "numbers", "tensor"])
def test_masks_are_white_from_half_on(kind: str) -> None:
    values = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    forms: dict[str, Any] = {
        "L": Image.fromarray(values),
        "1": Image.fromarray(values).point(lambda value: 255 * (value > 127), mode="1"),
        "RGB": Image.fromarray(values).convert("RGB"),
        "bytes": values,
        "bool": values > 127,
        "numbers": values / 255,
        "tensor": torch.from_numpy(values.copy())[None, None],
    }
    source = read_mask(forms[kind])
    assert source.pixels.tolist() == [[False, False, True, True]]
    assert (source.width, source.height) == (4, 1)
    assert source == read_mask(values)
    assert read_mask(source) is source


def test_what_is_transparent_in_a_mask_is_black() -> None:
    layered = np.full((1, 2, 4), 255, dtype=np.uint8)
    layered[0, 0, 3] = 0
    assert read_mask(Image.fromarray(layered)).pixels.tolist() == [[False, True]]
    assert read_mask(layered / np.float32(255)).pixels.tolist() == [[False, True]]


def bomb(side: int) -> bytes:
    """A PNG that says it has so many pixels on a side."""
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def cut() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()[:900]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "a.png is no image that can be read; these formats are: PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that can be read"),
        (bomb(40_000), r"too large, or says so \(Image size \(1600000000 pixels\) .*; up to 67 megapixels are read"),
        (bomb(10_000), r"too large, or says so \(Image size \(100000000 pixels\) .*; up to 67 megapixels are read"),
        (cut(), "is damaged, cut off, or has no colours that are known"),
    ],
    ids=["empty", "postscript", "bomb", "warned of", "cut"],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for read in READERS.values():
        with pytest.raises(RequestError, match=said):
            read(path)
        for handed in (content, io.BytesIO(content)):
            with pytest.raises(RequestError, match=rf"^(mask_|control_)?image \({len(content)} bytes\) .*") as refused:
                read(handed)
            assert re.search(said.removeprefix("a.png "), str(refused.value))


def test_bytes_are_no_path(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"bytes\) is no image that can be read"):
        read_image(os.fsencode(saved(tmp_path, "a.png")))


def test_files_that_are_too_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(tmp_path, "a.png").read_bytes()
    monkeypatch.setattr("zimage.files.images.MAX_FILE_BYTES", len(content))
    assert [read_image(way) for way in in_memory(tmp_path / "a.png")]
    monkeypatch.setattr("zimage.files.images.MAX_FILE_BYTES", len(content) - 1)
    for way in in_memory(tmp_path / "a.png"):
        with pytest.raises(RequestError, match="image has more than 0 MiB"):
            read_image(way)


@pytest.mark.parametrize("text", ["x" * 3_000_000, f"{'a' * 200}/no.png"])
def test_messages_show_little_of_a_path(text: str) -> None:
    for read in (*READERS.values(), read_recipe):
        with pytest.raises(RequestError) as refused:
            read(text)
        assert f"{text[:57]}...{text[-140:]}" in str(refused.value)
        assert len(str(refused.value)) < 260


def test_an_image_below_pillows_own_limit_is_refused_by_ours(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.png", Image.new("1", (8193, 8192)))
    with pytest.raises(RequestError, match="is 8193x8192, 67 megapixels; up to 67 are read"):
        read_image(path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("there-is-none.png", "there is no file there-is-none.png"),
        ("https://example.org/a.png", "image is an address; download the file"),
        (os.curdir, "not a regular file"),
        (7, "image must be a path, the bytes of .* a Pillow image, an array .* got int 7"),
        (io.StringIO("text"), "image is a file that cannot be read .*str.*; pass one that is open .* in binary mode"),
        (CLOSED, "image is a file that cannot be read .*closed"),
        ([BYTES], "image must be a path"),
        (BYTES[:, :, :2], r"got ndarray of shape \(5, 7, 2\)"),
        (np.stack([BYTES, BYTES]), "without or with a batch of 1"),
        (np.zeros((0, 7, 3)), "must be an array"),
        (torch.zeros(5, 7, 3), r"a tensor \(3, height, width\)"),
        (BYTES.astype(np.int32), "must be of bytes"),
        (BYTES.astype(float), "must have numbers in .0, 1., and they go from 0 to 248; divide bytes by 255"),
        (BYTES / 127.5 - 1, "take x / 2"),
        (np.full((2, 2, 3), np.nan), "must have numbers in"),
        (torch.eye(3).to_sparse(), r"image is a tensor whose values cannot be read \(.*Sparse.*\); pass a dense one"),
        (torch.zeros(3, 5, 7, device="meta"), r"whose values cannot be read \(.*meta tensor.*\); pass a dense one"),
        (Image.new("F", (2, 2)), "image is of Pillow's mode F, whose numbers have no range; pass an array"),
        (Image.new("RGB", (0, 2)), "no pixels: it is 0x2"),
    ],
)
def test_what_is_no_image_is_refused(value: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        read_image(value)


@pytest.mark.parametrize("mask", [Image.new("L", (4, 4)), np.zeros((4, 4), bool), np.ones((4, 4), np.uint8)])
def test_a_mask_that_marks_nothing_is_refused(mask: Any) -> None:
    with pytest.raises(RequestError, match="mask_image is black everywhere"):
        read_mask(mask)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]), st.data())
def test_damage_anywhere_is_a_request_error_or_an_image(kind: str, data: st.DataObject) -> None:
    file = io.BytesIO()
    PICTURE.save(file, kind)
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    read: Callable[[Any], SourceImage] = data.draw(st.sampled_from([read_image, read_mask]))
    with tempfile.NamedTemporaryFile() as damaged:
        damaged.write(content)
        damaged.flush()
        with suppress(RequestError):
            assert read(damaged.name).pixels.size
