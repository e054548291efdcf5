import os
from pathlib import Path

import pytest
from PIL import Image

from zimage.cli.targets import plan_targets
from zimage.errors import RequestError
from zimage.files.png import Picture

PICTURE = Picture.of(Image.new("RGB", (16, 16), "red"), None)


def opened(path: Path | str) -> tuple[str | None, tuple[int, int]]:
    """The format and size of an image file."""
    with Image.open(path) as image:
        return image.format, image.size


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_picture_is_named_after_its_seed_and_replaces_nothing(tmp_path: Path) -> None:
    for overwrite in (False, True):
        targets = plan_targets(None, 2, overwrite=overwrite)
        targets.save(PICTURE, 0, 7)
        targets.save(PICTURE, 1, 8)
    assert names(tmp_path) == ["zimage-7-2.png", "zimage-7.png", "zimage-8-2.png", "zimage-8.png"]
    (tmp_path / "folder").mkdir()
    assert plan_targets(Path("folder"), 1, overwrite=False).save(PICTURE, 0, 7) == Path("folder/zimage-7.png")


def test_a_dangling_link_counts_as_taken(tmp_path: Path) -> None:
    Path("zimage-7.png").symlink_to("nothing")
    assert plan_targets(None, 1, overwrite=False).save(PICTURE, 0, 7) == Path("zimage-7-2.png")


def test_one_file_or_numbered_files(tmp_path: Path) -> None:
    assert plan_targets(Path("a.png"), 1, overwrite=False).save(PICTURE, 0, 7) == Path("a.png")
    targets = plan_targets(Path("b.c.jpg"), 2, overwrite=False)
    assert [targets.save(PICTURE, index, 7) for index in range(2)] == [Path("b.c-1.jpg"), Path("b.c-2.jpg")]
    assert opened("b.c-1.jpg") == ("JPEG", (16, 16))


def test_an_existing_file_is_refused_unless_forced(tmp_path: Path) -> None:
    Path("a-2.png").write_bytes(b"old")
    plan_targets(Path("a.png"), 1, overwrite=False)
    with pytest.raises(RequestError, match=r"a-2.png exists already; .* \(--force\)"):
        plan_targets(Path("a.png"), 2, overwrite=False)
    plan_targets(Path("a.png"), 2, overwrite=True).save(PICTURE, 1, 7)
    assert opened("a-2.png") == ("PNG", (16, 16))


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    targets = plan_targets(Path("a.png"), 1, overwrite=False)
    Path("a.png").write_bytes(b"theirs")
    with pytest.raises(RequestError, match="exists already"):
        targets.save(PICTURE, 0, 7)
    assert Path("a.png").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("fox", "there is no suffix; name it like fox.png"),
        ("-", "there is no suffix"),
        (".png", "there is no suffix"),
        ("fox.xyz", r"\.xyz is no image format"),
        ("fox.psd", "cannot be saved as PSD; name the file like fox.png"),
        ("fox.xbm", "cannot be saved as XBM"),
        ("missing/fox.png", "there is no folder missing"),
        ("file/fox.png", "there is no folder file|file is not a folder"),
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_what_cannot_be_written_is_refused(tmp_path: Path, output: str, said: str, number: int) -> None:
    Path("file").touch()
    with pytest.raises(RequestError, match=said):
        plan_targets(Path(output), number, overwrite=True)
    assert names(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may always write
    for output in (None, tmp_path, tmp_path / "a.png"):
        with pytest.raises(RequestError, match="no permission"):
            plan_targets(output, 1, overwrite=False)


@pytest.mark.parametrize("suffix", ["png", "JPEG", "webp", "avif", "bmp", "tiff", "gif"])
def test_formats_that_pillow_writes(tmp_path: Path, suffix: str) -> None:
    plan_targets(Path(f"a.{suffix}"), 1, overwrite=False).save(PICTURE, 0, 7)
    assert opened(f"a.{suffix}") == (suffix.upper(), (16, 16))
