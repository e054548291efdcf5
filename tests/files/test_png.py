import copy
import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from zimage.errors import RequestError, ZImageWarning
from zimage.files import png
from zimage.files.atomic import FileError
from zimage.files.parameters import parameters_text
from zimage.files.png import Picture, read_recipe, save_png
from zimage.files.recipe import MAX_CHARACTERS, Recipe, pixel_digest
from zimage.request import GenerationRequest
from zimage.variants import TURBO

PROMPT = "ein Fuchs, 狐狸, 🦊"


def drawn() -> Image.Image:
    image = Image.radial_gradient("L").resize((64, 48))
    return Image.merge("RGB", [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image.rotate(90)])


def recipe_of(image: Image.Image, prompt: str = PROMPT) -> Recipe:
    request = GenerationRequest(prompt, seed=7, height=48, width=64, any_size=True).resolve(TURBO)
    model = {"source": "Tongyi-MAI/Z-Image-Turbo", "revision": "", "variant": "turbo", "fingerprint": ""}
    return Recipe(request, model, {"zimage": "0.1.0"}, pixel_digest(image))


def picture(prompt: str = PROMPT) -> Picture:
    image = drawn()
    return Picture.of(image, recipe_of(image, prompt))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: bytes, size: tuple[int, int] = (1, 1)) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 4))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


def user_comment(image: Image.Image) -> str:
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
    assert comment[:8] == b"UNICODE\0"
    return str(comment[8:].decode("utf-16-be"))


def test_a_png_holds_the_recipe_and_the_parameters(tmp_path: Path) -> None:
    image = drawn()
    save_png(image, tmp_path / "a.png", recipe_of(image))
    assert read_recipe(tmp_path / "a.png") == recipe_of(image)
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.format == "PNG"
        assert list(opened.info) == ["zimage", "parameters"]
        assert opened.info["parameters"] == parameters_text(recipe_of(image))
        assert read_recipe(opened) == recipe_of(image)
        assert pixel_digest(opened) == pixel_digest(image)
    data = (tmp_path / "a.png").read_bytes()
    assert data.index(b"iTXtzimage\0") < data.index(b"IDAT")
    assert data.count(b"iTXt") == 2
    assert b"tEXt" not in data


def test_save_png_overwrites_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(FileError, match="exists already"):
        save_png(drawn(), tmp_path / "a.png", None)
    assert (tmp_path / "a.png").read_bytes() == b"old"
    save_png(drawn(), tmp_path / "a.png", None, overwrite=True)
    with pytest.raises(RequestError, match="has no zimage recipe"):
        read_recipe(tmp_path / "a.png")


def test_a_picture_is_an_image() -> None:
    image = picture()
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size, image.info) == ("RGB", (64, 48), {})
    assert image.tobytes() == drawn().tobytes()
    assert image.recipe == recipe_of(drawn())
    assert read_recipe(image) == image.recipe
    assert Picture.of(drawn(), None).recipe is None


@pytest.mark.parametrize("target", ["extension", "format", "named file", "memory", "lower case", "bytes path"])
def test_saving_a_picture_as_png_carries_the_recipe(tmp_path: Path, target: str) -> None:
    image, path = picture(), tmp_path / ("a.png" if target != "format" else "a.dat")
    if target == "memory":
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        path.write_bytes(buffer.getvalue())
    elif target == "named file":
        with open(path, "wb") as file:
            image.save(file)
            assert not file.closed
    else:
        formats = {"format": "PNG", "lower case": "png"}
        image.save(os.fsencode(path) if target == "bytes path" else path, formats.get(target))
    assert read_recipe(path) == image.recipe
    assert read_recipe(io.BytesIO(path.read_bytes())) == image.recipe
    for kind in (bytes, bytearray, memoryview):
        assert read_recipe(kind(path.read_bytes())) == image.recipe
    with pytest.raises(RequestError, match="this file of 3 bytes is not a PNG file"):
        read_recipe(b"PNG")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_the_callers_own_chunks_or_no_recipe_are_kept_to(tmp_path: Path) -> None:
    own = PngInfo()
    own.add_text("Title", "mine")
    picture().save(tmp_path / "a.png", pnginfo=own)
    picture().save(tmp_path / "b.png", recipe=False)
    picture().save(tmp_path / "c.jpg", recipe=False)
    Picture.of(drawn(), None).save(tmp_path / "d.png")
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b, Image.open(tmp_path / "c.jpg") as c:
        assert a.info == {"Title": "mine"}
        assert b.info == {}
        assert "exif" not in c.info
    with Image.open(tmp_path / "d.png") as d:
        assert d.info == {}


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp"])
def test_jpeg_and_webp_hold_the_parameters(tmp_path: Path, suffix: str) -> None:
    picture().save(tmp_path / f"a.{suffix}", quality=95)
    with Image.open(tmp_path / f"a.{suffix}") as opened:
        assert user_comment(opened) == parameters_text(recipe_of(drawn()))
    own = Image.Exif()
    own[ExifTags.Base.Software] = "mine"
    picture().save(tmp_path / f"b.{suffix}", exif=own)
    with Image.open(tmp_path / f"b.{suffix}") as opened:
        assert dict(opened.getexif()) == {ExifTags.Base.Software: "mine"}
    with pytest.raises(RequestError, match="is not a PNG file"):
        read_recipe(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("suffix", ["bmp", "gif", "tiff", "ppm", "pdf"])
def test_other_formats_are_saved_as_pillow_does(tmp_path: Path, suffix: str) -> None:
    picture().save(tmp_path / f"a.{suffix}")
    picture().save(tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").stat().st_size > 100


def test_appending_to_a_file_appends(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.pdf")
    first = (tmp_path / "a.pdf").read_bytes()
    picture().save(tmp_path / "a.pdf", append=True)
    both = (tmp_path / "a.pdf").read_bytes()
    assert both.startswith(first)
    assert len(both) > len(first)


def test_an_unknown_extension_is_pillows_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown file extension"):
        picture().save(tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="unknown file extension"):
        picture().save(io.BytesIO())
    assert list(tmp_path.iterdir()) == []


def test_saving_to_a_path_overwrites_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises(FileError, match="exists already"):
        picture().save(tmp_path / "a.png", overwrite=False)
    with pytest.raises(OSError, match="cannot write mode RGB as XBM"):
        picture().save(tmp_path / "a.png", "XBM")
    assert (tmp_path / "a.png").read_bytes() == b"old"
    picture().save(tmp_path / "a.png")
    assert read_recipe(tmp_path / "a.png") == picture().recipe
    with pytest.raises(OSError, match="there is no folder"):
        picture().save(tmp_path / "b" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_saving_into_a_pipe_does_not_replace_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.ppm"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="seekable"):  # Pillow's own answer: it opens for reading and writing
        picture().save(pipe)
    os.close(reader)
    assert pipe.is_fifo()
    picture().save("/dev/null", "PPM")
    assert not Path("/dev/null").is_file()


EDITS = {
    "resize": lambda image: image.resize((32, 24)),
    "crop": lambda image: image.crop((0, 0, 8, 8)),
    "copy": lambda image: image.copy(),
    "convert": lambda image: image.convert("L"),
    "convert to the same": lambda image: image.convert("RGB"),
    "rotate": lambda image: image.rotate(0),
    "transpose": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "filter": lambda image: image.point(lambda value: 255 - value),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_plain_images(tmp_path: Path, edit: str) -> None:
    edited = EDITS[edit](picture())
    assert type(edited) is Image.Image
    edited.save(tmp_path / "a.png")
    with pytest.raises(RequestError, match="has no zimage recipe"):
        read_recipe(tmp_path / "a.png")
    with pytest.raises(RequestError, match="this image has no recipe"):
        read_recipe(edited)


def test_a_picture_changed_in_place_is_saved_without_its_recipe(tmp_path: Path) -> None:
    image = picture()
    ImageDraw.Draw(image).line((0, 0, 9, 9), "red")
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.png") as opened, Image.open(tmp_path / "a.jpg") as other:
        assert opened.info == {}
        assert "exif" not in other.info
    with pytest.raises(RequestError, match="pixels were changed"):
        read_recipe(image)


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, *(lambda image, n=n: pickle.loads(pickle.dumps(image, n)) for n in range(2, 6))]
)
def test_copying_and_pickling_keep_the_recipe(clone: Any) -> None:
    image = picture()
    cloned = clone(image)
    assert type(cloned) is Picture
    assert cloned == image
    assert cloned.recipe == image.recipe
    cloned.putpixel((0, 0), (9, 9, 9))
    assert cloned != image
    assert image.current_recipe() == image.recipe


def test_a_notebook_shows_a_picture() -> None:
    shown = picture()._repr_png_()
    assert shown is not None
    assert read_recipe(io.BytesIO(shown)) == picture().recipe


def test_texts_too_long_for_a_file_are_left_out_with_a_warning(tmp_path: Path) -> None:
    long = picture("x" * (MAX_CHARACTERS + 1))
    with pytest.warns(ZImageWarning, match="too long"):
        long.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert list(opened.info) == ["parameters"]
    with pytest.warns(ZImageWarning, match="too long for a JPEG") as caught:
        picture("x" * 40_000).save(tmp_path / "a.jpg")
    assert caught[0].filename == __file__
    picture("x" * 30_000).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as opened:
        assert user_comment(opened).startswith("x" * 30_000)


def itxt(text: bytes, keyword: bytes = b"zimage", compressed: bool = False) -> bytes:
    flags = b"\1\0" if compressed else b"\0\0"
    return chunk(b"iTXt", keyword + b"\0" + flags + b"\0\0" + (zlib.compress(text) if compressed else text))


HOSTILE = {
    "empty": (b"", "is not a PNG file"),
    "text": (b"hello", "is not a PNG file"),
    "signature only": (b"\x89PNG\r\n\x1a\n", "is not a PNG file|cannot be read"),
    "no recipe": (png_with(), "has no zimage recipe"),
    "other text": (png_with(itxt(b"{}", b"prompt")), "has no zimage recipe"),
    "broken JSON": (png_with(itxt(b"{")), "not valid JSON"),
    "not UTF-8": (png_with(itxt(b"\xff\xfe")), "has no zimage recipe"),
    "too long": (png_with(itxt(b" " * (MAX_CHARACTERS + 1))), "characters long"),
    "text bomb": (png_with(itxt(b" " * 10**8, compressed=True)), "cannot be read as a PNG|Decompressed data too large"),
    "many texts": (png_with(*[itxt(b" " * 2**20, b"k%d" % n, True) for n in range(65)]), "cannot be read as a PNG"),
    "pixel bomb": (png_with(itxt(b"{}"), size=(60_000, 60_000)), "cannot be read as a PNG|decompression bomb"),
    "too large": (png_with(itxt(b"{}"), size=(8192, 8208)), "too large"),
    "too few pixels": (png_with(itxt(b"{}"), size=(9, 9)), "damaged or cut off"),
    "animation": (png_with(chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), itxt(b"{}")), "animation|cannot be read"),
    "broken checksum": (png_with(itxt(b"{}")[:-1] + b"\0"), "is not a PNG file|cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_png_is_a_request_error(tmp_path: Path, name: str) -> None:
    data, said = HOSTILE[name]
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(RequestError, match=said) as caught:
        read_recipe(tmp_path / "a.png")
    assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match=said):
        read_recipe(io.BytesIO(data))


def test_a_png_cut_off_anywhere_is_a_request_error(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    whole = buffer.getvalue()
    last_pixels = whole.index(b"IEND") - 16  # what follows them are checksums, with which nothing is lost
    for length in [*range(0, last_pixels, 37), last_pixels]:
        with pytest.raises(RequestError):
            read_recipe(io.BytesIO(whole[:length]))
    assert read_recipe(io.BytesIO(whole)) == picture().recipe


def test_a_png_changed_anywhere_is_a_recipe_or_a_request_error() -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    whole = buffer.getvalue()
    for position in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[position] ^= 0x55
        try:
            assert read_recipe(io.BytesIO(bytes(changed))) == picture().recipe
        except RequestError:
            continue


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "there is no file"),
        ("folder", "not a regular file|Is a directory"),
        ("pipe", "not a regular file"),
        ("loop", "symbolic links"),
        ("dangling", "there is no file"),
        ("huge", "MiB; up to 256 are read"),
        ("a\0b", r"null (byte|character)"),
    ],
)
def test_what_is_not_a_readable_file_is_a_request_error(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(png.MAX_FILE_BYTES + 1)
    with pytest.raises(RequestError, match=said):
        read_recipe(f"{tmp_path}/{name}")
    open_files = Path(f"/proc/{os.getpid()}/fd")
    if open_files.is_dir():
        assert not [fd for fd in open_files.iterdir() if str(fd.resolve(strict=False)).startswith(str(tmp_path))]


def test_a_recipe_is_read_through_a_link(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "a.png")
    assert read_recipe(tmp_path / "link") == picture().recipe


def test_the_files_room_loads_no_torch() -> None:
    code = "import sys, zimage.files.png; print('torch' in sys.modules, 'numpy' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False"]
