"""Pictures on disk: a PNG carries its recipe, and the recipe is read back from any PNG without trusting it.

`Picture` is the Pillow image that a pipeline returns. What a recipe means is `recipe`'s, how a file comes to be whole
is `atomic`'s; nothing here knows of models.
"""

from __future__ import annotations

import os
import stat
import warnings
from io import BytesIO
from typing import IO, Any, cast

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo

from ..errors import RequestError, ZImageWarning
from .atomic import PATHS, AnyPath, FileError, write_atomically
from .parameters import parameters_text
from .recipe import MAX_CHARACTERS, Recipe, pixel_digest

__all__ = ["Picture", "read_recipe", "save_png", "write_atomically"]

KEYWORD = "zimage"
"""Keyword of the PNG text chunk with the recipe's JSON; `parameters` is the one that other tools read."""
MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 8192**2
"""Largest file and image that are read: an uncompressed picture of the models' largest sides fits."""
MAX_SHOWN = 200
"""Characters of a path that messages show."""
MAX_JPEG_EXIF = 65_000
"""A JPEG segment ends at 65535 bytes."""


class Picture(Image.Image):
    """An image with the recipe it was made from; `save` writes the recipe along.

    It is a Pillow image in every way. What edits return (`resize`, `crop`, `convert`, `copy`...) is a plain image:
    no longer this picture, so without its recipe. An image changed in place keeps the attribute, but is saved without.
    """

    recipe: Recipe | None = None

    @classmethod
    def of(cls, image: Image.Image, recipe: Recipe | None) -> Picture:
        """A copy of `image` that carries `recipe`."""
        picture = cls()
        info, *pixels = Image.Image.__getstate__(image)
        picture.__setstate__([dict(info), *pixels, recipe])
        return picture

    def save(self, fp: AnyPath | IO[bytes], format: str | None = None, **params: Any) -> None:
        """Save as `PIL.Image.Image.save` does, with the recipe, and to a path atomically.

        PNG holds the recipe and the parameters text, unless `pnginfo` is given; JPEG and WebP hold the parameters
        text in EXIF, unless `exif` is given. `recipe=False` leaves both out. `overwrite=False` refuses a file that
        exists. Raises `FileError`, an `OSError`, where the path cannot be written to.
        """
        carry, overwrite = params.pop("recipe", True), params.pop("overwrite", True)
        kind = _format_of(fp, format)
        recipe = self.current_recipe() if carry and kind in ("PNG", "JPEG", "WEBP") else None
        if recipe is not None and kind == "PNG" and params.get("pnginfo") is None:
            params["pnginfo"] = _chunks(recipe)
        elif recipe is not None and kind != "PNG" and "exif" not in params:
            params |= _exif(recipe, kind)
        if kind is None or not isinstance(fp, PATHS) or params.get("append") or (overwrite and _is_device(fp)):
            super().save(fp, format, **params)
            return
        save = super().save
        write_atomically(fp, lambda file: save(file, kind, **params), overwrite=overwrite)

    def current_recipe(self) -> Recipe | None:
        """The recipe, if the pixels are still those that it made."""
        if self.recipe is None or pixel_digest(self) != self.recipe.pixels:
            return None
        return self.recipe

    def __copy__(self) -> Picture:
        return Picture.of(self, self.recipe)

    def __getstate__(self) -> list[Any]:
        return [*super().__getstate__(), self.recipe]

    def __setstate__(self, state: list[Any]) -> None:
        super().__setstate__(state[:-1])
        self.recipe = state[-1]


def save_png(image: Image.Image, path: AnyPath, recipe: Recipe | None, overwrite: bool = False) -> None:
    """Write a PNG with a recipe, or with none, whole or not at all; raises `FileError` as `write_atomically` does."""
    chunks = None if recipe is None else _chunks(recipe)
    save = Image.Image.save
    write_atomically(path, lambda file: save(image, file, "PNG", pnginfo=chunks), overwrite=overwrite)


def read_recipe(source: AnyPath | bytearray | memoryview | IO[bytes] | Image.Image) -> Recipe:
    """The recipe that a PNG, an image opened from one, or a `Picture` carries; the file may come from anyone. Bytes are
    what is in a file, never its path.

    Raises `RequestError`, and nothing else, where there is none, it is not valid, or the file is damaged or no PNG.
    """
    if isinstance(source, Picture):
        recipe = source.current_recipe()
        if recipe is None:
            raise RequestError("this picture has no recipe, or its pixels were changed since; read it from its file")
        return recipe
    if isinstance(source, Image.Image):
        if not isinstance(source, PngImageFile):
            raise RequestError("this image has no recipe, as an edited one has not; read the recipe from its PNG file")
        return _recipe_in(source, "this image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(BytesIO(source), f"this file of {memoryview(source).nbytes} bytes")
    if not isinstance(source, PATHS):
        return _read(source, "this file")
    name = brief(source)
    with regular_file(source, name) as file:
        return _read(file, name)


def _read(file: IO[bytes], name: str) -> Recipe:
    try:
        image = Image.open(file, formats=["PNG"])
    except UnidentifiedImageError:
        raise RequestError(f"{name} is not a PNG file; only PNG files hold recipes") from None
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        raise RequestError(f"{name} cannot be read as a PNG file: {error}") from None
    return _recipe_in(cast(PngImageFile, image), name)


def _recipe_in(image: PngImageFile, name: str) -> Recipe:
    if image.width * image.height > MAX_PIXELS or getattr(image, "is_animated", False):
        raise RequestError(f"{name} is no picture of these models: too large, or an animation")
    try:
        text = image.text.get(KEYWORD)  # decodes the whole image, so it is known to be undamaged
    except Exception as error:
        raise RequestError(f"{name} is damaged or cut off: {error}") from None
    if text is None:
        raise RequestError(
            f"{name} has no zimage recipe: it was made by another program, saved without one, or edited since"
        )
    return Recipe.from_json(str(text))


def brief(path: AnyPath) -> str:
    """A path as messages show it: of a long one, or of an image that was passed for one, the beginning and the end."""
    name = os.fsdecode(path)
    return name if len(name) <= MAX_SHOWN else f"{name[:57]}...{name[60 - MAX_SHOWN :]}"


def regular_file(path: AnyPath, name: str) -> IO[bytes]:
    """Open a regular file of a sane size; a pipe or device is refused without waiting for it."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        raise FileError(f"there is no file {name}") from None
    except (OSError, ValueError) as error:
        raise FileError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{name} is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise FileError(f"{name} has {status.st_size / 2**20:.0f} MiB; up to {MAX_FILE_BYTES / 2**20:.0f} are read")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _chunks(recipe: Recipe) -> PngInfo:
    chunks = PngInfo()
    text = recipe.to_json()
    if len(text) <= MAX_CHARACTERS:
        chunks.add_itxt(KEYWORD, text)
    else:
        warnings.warn("the recipe is too long to be read back, so the file has none", ZImageWarning, stacklevel=4)
    chunks.add_itxt("parameters", parameters_text(recipe))
    return chunks


def _exif(recipe: Recipe, kind: str | None) -> dict[str, bytes]:
    """The parameters text as the EXIF user comment, the way AUTOMATIC1111's web UI writes and reads it."""
    exif = Image.Exif()
    comment = b"UNICODE\0" + parameters_text(recipe).encode("utf-16-be", "replace")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    written = exif.tobytes()
    if kind == "JPEG" and len(written) > MAX_JPEG_EXIF:
        warnings.warn("the prompt is too long for a JPEG's EXIF, so the file has none", ZImageWarning, stacklevel=3)
        return {}
    return {"exif": written}


def _format_of(fp: AnyPath | IO[bytes], format: str | None) -> str | None:
    """The format that Pillow will save in; `None` if it will not know either."""
    if format:
        return format.upper()
    name = fp if isinstance(fp, PATHS) else getattr(fp, "name", None)
    if not isinstance(name, PATHS):
        return None
    return Image.registered_extensions().get(os.path.splitext(os.fsdecode(name))[1].lower())


def _is_device(path: AnyPath) -> bool:
    """Whether something is there that is written into, not replaced: a pipe, a terminal, `/dev/null`."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
