import errno
import os
import stat
from pathlib import Path
from typing import IO

import pytest

from zimage.errors import RequestError
from zimage.files.atomic import FileError, check_target, write_atomically


def hello(file: IO[bytes]) -> None:
    file.write(b"hello")


def test_writes_a_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", hello, overwrite=False)
    write_atomically(os.fsencode(tmp_path / "b"), hello, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"hello", "b": b"hello"}


def test_the_file_is_named_only_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, bool]] = []

    def log(name: str) -> None:
        function = getattr(os, name)

        def call(*arguments: object) -> object:
            events.append((name, (tmp_path / "a").exists()))
            return function(*arguments)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "link", "replace"):
        log(name)
    write_atomically(tmp_path / "a", hello, overwrite=False)
    assert events == [("fsync", False), ("link", False), ("fsync", True)]
    events.clear()
    write_atomically(tmp_path / "a", hello, overwrite=True)
    assert [name for name, _ in events] == ["fsync", "replace", "fsync"]


def test_permissions_follow_the_umask_and_survive_overwriting(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", hello, overwrite=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    (tmp_path / "a").chmod(0o604)
    write_atomically(tmp_path / "a", hello, overwrite=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o604


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("x"), OSError("encoder error -2")])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path, failure: BaseException, overwrite: bool) -> None:
    (tmp_path / "old").write_bytes(b"old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise failure

    with pytest.raises(type(failure)) as caught:
        write_atomically(tmp_path / ("old" if overwrite else "new"), fail, overwrite=overwrite)
    assert caught.value is failure
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"old": b"old"}


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def fail(file: IO[bytes]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*new'"):
        write_atomically(tmp_path / "new", fail, overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    if not hard_links:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        write_atomically(tmp_path / "other", hello, overwrite=False)
        assert (tmp_path / "other").read_bytes() == b"hello"
        (tmp_path / "other").unlink()

    def race(file: IO[bytes]) -> None:
        (tmp_path / "a").write_bytes(b"theirs")

    with pytest.raises(FileError, match="exists already"):
        write_atomically(tmp_path / "a", race, overwrite=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"theirs"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "real")
    with pytest.raises(FileError, match="exists already"):
        write_atomically(tmp_path / "link", hello, overwrite=False)
    write_atomically(tmp_path / "link", hello, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "real").read_bytes() == b"hello"


def test_a_dangling_link_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileError, match="exists already"):
        write_atomically(tmp_path / "link", hello, overwrite=False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing/a", "there is no folder"),
        ("file/a", "there is no folder|is not a folder"),
        ("folder", "is a folder, not a file"),
        ("new/", "is a folder, not a file"),
        ("", "is a folder|no name"),
        ("a\0b", "no name for a file"),
        ("x" * 300, "File name too long"),
        ("pipe", "not a regular file"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())

    def never(file: IO[bytes]) -> None:
        raise AssertionError("nothing may be computed for a path that cannot be written")

    with pytest.raises(FileError, match=said):
        check_target(f"{tmp_path}/{name}", overwrite=True)
    with pytest.raises(FileError, match=said) as caught:
        write_atomically(f"{tmp_path}/{name}", never, overwrite=True)
    assert isinstance(caught.value, RequestError)
    assert isinstance(caught.value, OSError)
    assert sorted(tmp_path.iterdir()) == before


def test_permissions_are_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"old")
    denied = tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != denied)  # root may always write
    with pytest.raises(FileError, match="no permission to create files"):
        write_atomically(tmp_path / "a", hello, overwrite=True)
    denied = tmp_path / "a"
    with pytest.raises(FileError, match="write-protected"):
        write_atomically(tmp_path / "a", hello, overwrite=True)
    assert (tmp_path / "a").read_bytes() == b"old"
