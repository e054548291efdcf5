"""Opens and reads files that nobody vouches for: of bounded size, regular files only, and JSON without surprises.

Every failure is a `CheckpointError` that names the file. Knows nothing of what the files mean, and no torch.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError

MAX_CONFIG = 1 << 20
"""Largest JSON config that is read, in bytes; those on the hub have a few thousand."""
MAX_INDEX = 16 << 20
"""Largest shard index that is read, in bytes; that of the largest component on the hub has 50 thousand."""

RESTORE = "take the file from the original repository again"

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2
_SHORT.maxlong = 24


def shown(value: object) -> str:
    """`value` as it may stand in a message: short, on one line, whatever a file says."""
    return _SHORT.repr(value)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for unbuffered reading; anything else is refused and never waited for."""
    try:
        _require_regular(path, os.stat(path).st_mode)
        file = open(path, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115
    except FileNotFoundError as error:
        problem = "is a link to a file that is not there" if path.is_symlink() else "is missing"
        raise CheckpointError(f"{path} {problem}; {RESTORE}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be opened: {reason(error)}") from error
    try:
        _require_regular(path, os.fstat(file.fileno()).st_mode)
    except BaseException:
        file.close()
        raise
    return file


def read_up_to(file: BinaryIO, length: int) -> bytes:
    """The next `length` bytes of an open file, or as many as are left."""
    parts = []
    while length and (part := file.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def exists(path: Path) -> bool:
    """Whether there is anything at `path`, be it only a dead link."""
    return os.path.lexists(path)


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a regular file of at most `limit` bytes."""
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise CheckpointError(f"{path} has {size} bytes, at most {limit} were expected; {RESTORE}")
            content = b"".join(iter(lambda: file.read(limit + 1), b""))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    if not content:
        raise CheckpointError(f"{path} is empty; {RESTORE}")
    return content


def read_text(path: Path, limit: int) -> str:
    """All of a UTF-8 text file of at most `limit` bytes."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {reason(error)}; {RESTORE}") from error


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file: no doubled keys, no NaN or Infinity, no nesting beyond the interpreter's depth."""
    return parse_json(read_bytes(path, limit), str(path))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `content`; `where` names it in errors."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except RecursionError as error:
        raise CheckpointError(f"{where} is not a valid config: it is nested too deeply; {RESTORE}") from error
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {reason(error)}; {RESTORE}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, got {type(value).__name__}; {RESTORE}")
    return value


def reason(error: BaseException) -> str:
    """What an exception says, in one line of bounded length."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _open_at_once(path: str, flags: int) -> int:
    # A pipe put in the file's place after the check would otherwise block the open.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise CheckpointError(f"{path} must be a file, got {kind}; {RESTORE}")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        doubled = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(doubled)} occurs twice")
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")
