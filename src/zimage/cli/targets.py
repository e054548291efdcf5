"""Where pictures go: the names of output files, refused before anything is computed where they cannot be written.

Knows file names and what Pillow can save; nothing of models.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RequestError

if TYPE_CHECKING:
    from ..files.png import Picture

_QUALITY = {"JPEG": 95, "WEBP": 95, "AVIF": 90}
"""Pillow's defaults are made for photographs on web pages and show in flat areas."""


@dataclass(frozen=True)
class Targets:
    """The files of a call: those that `-o` names, or names after the seed in a folder."""

    files: tuple[Path, ...]
    folder: Path
    overwrite: bool

    def save(self, picture: Picture, index: int, seed: int) -> Path:
        """Write picture number `index` (from 0) and return its file."""
        if self.files:
            return save_picture(picture, self.files[index], overwrite=self.overwrite)
        from ..files.atomic import FileError

        names = chain([f"zimage-{seed}.png"], (f"zimage-{seed}-{number}.png" for number in count(2)))
        for path in (self.folder / name for name in names):
            try:
                return save_picture(picture, path, overwrite=False)
            except FileError:
                if not os.path.lexists(path):
                    raise
        raise AssertionError("numbers do not end")


def plan_targets(output: Path | None, number: int, *, overwrite: bool) -> Targets:
    """The targets of `number` pictures; raises `RequestError` if they cannot be written or may not be replaced."""
    from ..files.atomic import check_target

    if output is None or output.is_dir():
        folder = output or Path()
        check_target(folder / "zimage.png", overwrite=True)
        return Targets((), folder, overwrite=False)
    check_format(output)
    files = [output] if number == 1 else [_numbered(output, index + 1) for index in range(number)]
    for file in files:
        try:
            check_target(file, overwrite=overwrite)
        except RequestError as error:
            hint = "" if overwrite or not os.path.lexists(file) or file.is_dir() else " (--force)"
            raise RequestError(f"{error}{hint}") from None
    return Targets(tuple(files), output.parent, overwrite)


def check_format(path: Path) -> None:
    """Raise `RequestError` if Pillow cannot save a picture under this suffix."""
    from io import BytesIO

    from PIL import Image

    kind = _kind(path)
    try:
        if kind is None:
            what = f"{path.suffix} is no image format" if path.suffix else "there is no suffix"
            raise RequestError(
                f"cannot write {path}: {what}; name it like {path.stem}.png, or give a folder that exists"
            )
        Image.new("RGB", (16, 16)).save(BytesIO(), kind)
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"pictures cannot be saved as {kind}; name the file like {path.stem}.png") from error


def save_picture(picture: Picture, path: Path, *, overwrite: bool) -> Path:
    """Write a picture in the format of the path's suffix and return the path."""
    kind = _kind(path)
    quality = {"quality": _QUALITY[kind]} if kind in _QUALITY else {}
    picture.save(path, kind, overwrite=overwrite, **quality)
    return path


def _kind(path: Path) -> str | None:
    from PIL import Image

    return Image.registered_extensions().get(path.suffix.lower())


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")
