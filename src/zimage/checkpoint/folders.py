"""Folders that appear whole or not at all, and the copying of known files into them.

Knows paths and bytes; what a folder should hold is its caller's business.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..errors import CheckpointError, RequestError
from .configs import MODEL_INDEX
from .reading import exists, open_regular, reason

_COPY = 16 << 20


def target_path(target: str | os.PathLike[str]) -> Path:
    """Where `target` is, "~" being the home folder; raises `RequestError` for what is no path."""
    try:
        return Path(target).expanduser()
    except (TypeError, RuntimeError) as error:
        raise RequestError(f"what is written needs a path, got {target!r} ({reason(error)})") from None


def check_free(target: Path, *, overwrite: bool = False) -> None:
    """Raise `RequestError` where `whole_or_nothing` would refuse `target`."""
    if not exists(target):
        return
    if os.path.ismount(os.path.realpath(target)):
        raise RequestError(
            f"{target} is a mount point, and what is written takes the place of its folder as a whole; name a folder "
            f"in it, such as {target / 'model'}"
        )
    if target.is_dir() and not any(target.iterdir()):
        return
    if overwrite and target.is_dir() and not target.is_symlink() and (target / MODEL_INDEX).is_file():
        return
    wanted = "choose another, or delete it first"
    if overwrite:
        raise RequestError(f"{target} exists and is no checkpoint folder, so it is not replaced; {wanted}")
    raise RequestError(f"{target} exists and is not an empty folder; {wanted}")


@contextmanager
def whole_or_nothing(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `target` that takes its place in the end, and is removed if anything fails, with the
    folders above it that were made for it.

    Of a link the folder that it leads to is written. With `overwrite` a checkpoint that is at `target` stays until
    then. Raises `CheckpointError` for what the disk refuses.
    """
    check_free(target, overwrite=overwrite)
    place = Path(os.path.realpath(target))  # neither "." nor a link is a name to rename to
    partial, made = _beside(place, "partial"), [folder for folder in place.parents if not exists(folder)]
    try:
        partial.mkdir(parents=True)
        yield partial
        check_free(place, overwrite=overwrite)  # again, for it took its time
        _take_place(partial, place, overwrite)
    except OSError as error:
        _remove(partial, made)
        raise CheckpointError(f"{target} cannot be written: {reason(error)}") from error
    except BaseException:
        _remove(partial, made)
        raise


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file, or what a link points to; raises `CheckpointError`."""
    try:
        with open_regular(source) as reading, open(target, "wb") as writing:
            shutil.copyfileobj(reading, writing, _COPY)
            sync(writing)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be copied to {target}: {reason(error)}") from error


def write_json(path: Path, config: dict[str, Any]) -> None:
    """Write a config; the folder is made if it is not there."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2) + "\n")
        sync(file)


def sync(file: IO[Any]) -> None:
    """Let all that was written to an open file be on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _take_place(partial: Path, target: Path, overwrite: bool) -> None:
    """Rename `partial` to `target`, which is not there or is empty; with `overwrite` what was there is deleted after
    that, and put back if it fails."""
    if not overwrite or not target.exists():
        if target.exists():
            target.rmdir()
        partial.rename(target)
        return
    before = _beside(target, "before")
    target.rename(before)
    try:
        partial.rename(target)
    except BaseException:
        before.rename(target)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _remove(partial: Path, made: list[Path]) -> None:
    """Remove a folder, then those above it that were made for it, until one has something else in it."""
    shutil.rmtree(partial, ignore_errors=True)
    with suppress(OSError):
        for folder in made:
            folder.rmdir()


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.{kind}")
