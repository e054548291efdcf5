"""Files that appear whole or not at all: written under a temporary name, flushed to the disk, then renamed.

Knows paths and bytes; what is in a file is its caller's business.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..errors import RequestError

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
PATHS = (str, bytes, os.PathLike)
"""`AnyPath` for `isinstance`."""


class FileError(RequestError, OSError):
    """A file cannot be read or written at this path; the message says why. Also an `OSError`, like `open`'s."""


def check_target(path: AnyPath, *, overwrite: bool) -> None:
    """Raise `FileError` where `write_atomically` would refuse `path`, without writing anything."""
    _target(path, overwrite=overwrite)


def write_atomically(path: AnyPath, write: Callable[[IO[bytes]], object], *, overwrite: bool) -> None:
    """Let `write` fill a file that is then named `path`; on any failure the folder is left as it was.

    A file that `overwrite` allows to replace stays until then, and its permissions stay; a symbolic link stays a link.
    Without `overwrite` a file that appears at `path` in the meantime is not replaced either.
    Raises `FileError` where there is no folder to write to, `path` is no regular file, or the file exists; other
    failures of the disk are `OSError` with the path, and what `write` raises is passed on.
    """
    target, mode = _target(path, overwrite=overwrite)
    temporary = target.parent / f".zimage-{secrets.token_hex(8)}.partial"
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        with open(os.open(temporary, flags, 0o666), "w+b") as file:
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, target)
        else:
            _rename_to_free_name(temporary, target)
        _flush_folder(target.parent)
    except OSError as error:
        if error.errno is None or error.filename is not None or isinstance(error, RequestError):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _target(path: AnyPath, *, overwrite: bool) -> tuple[Path, int | None]:
    """The file to write, behind any link if that may be overwritten, and its mode if it exists."""
    name = os.fsdecode(path)
    if not name or "\0" in name:
        raise FileError(f"{name!r} is no name for a file")
    target = Path(os.path.realpath(name) if overwrite and os.path.islink(name) else name)
    folder, mode = _mode(target.parent), _mode(target)
    if folder is None:
        raise FileError(f"cannot write {name}: there is no folder {target.parent}; create it first")
    if not stat.S_ISDIR(folder):
        raise FileError(f"cannot write {name}: {target.parent} is not a folder")
    if name.endswith((os.sep, os.altsep or os.sep)) or (mode is not None and stat.S_ISDIR(mode)):
        raise FileError(f"{name} is a folder, not a file; add a file name")
    if os.path.lexists(target) and not overwrite:
        raise FileError(f"{name} exists already; choose another name, or overwrite it")
    if mode is not None and not stat.S_ISREG(mode):
        raise FileError(f"{name} is not a regular file; choose another name")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise FileError(f"cannot write {name}: no permission to create files in {target.parent}")
    if mode is not None and not os.access(target, os.W_OK):
        raise FileError(f"cannot write {name}: it is write-protected")
    return target, mode


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror}") from error


def _rename_to_free_name(temporary: Path, target: Path) -> None:
    """Rename without replacing, also where `target` came up just now."""
    try:
        if os.name == "nt":
            os.rename(temporary, target)
            return
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise
        except OSError:  # no hard links here (FAT, some network disks): take the name first, then fill it
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            os.replace(temporary, target)
    except FileExistsError:
        raise FileError(f"{target} exists already; choose another name, or overwrite it") from None


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can; the file itself is on the disk already
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
