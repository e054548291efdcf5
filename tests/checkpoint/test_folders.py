"""Folders that appear whole or not at all: what came there meanwhile stays, and the current one may be the target."""

from __future__ import annotations

from pathlib import Path

import pytest

from zimage import CheckpointError, RequestError
from zimage.checkpoint.folders import whole_or_nothing


@pytest.mark.parametrize("is_there", [False, True])
def test_an_empty_or_missing_folder_is_taken(tmp_path: Path, is_there: bool) -> None:
    target = tmp_path / "model"
    if is_there:
        target.mkdir()
    with whole_or_nothing(target) as partial:
        (partial / "weights").write_text("new")
    assert [file.name for file in tmp_path.rglob("*")] == ["model", "weights"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_there_meanwhile_stays(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "model"

    def write() -> None:
        with whole_or_nothing(target, overwrite=overwrite) as partial:
            (partial / "weights").write_text("new")
            target.mkdir()
            (target / "precious").write_text("old")

    with pytest.raises(RequestError, match="model exists and is"):
        write()
    assert {file.name for file in tmp_path.rglob("*")} == {"model", "precious"}


def test_a_checkpoint_is_replaced_only_when_that_is_meant(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "model_index.json").write_text("{}")
    with pytest.raises(RequestError, match="is not an empty folder"), whole_or_nothing(target):
        pytest.fail("it began")
    with whole_or_nothing(target, overwrite=True) as partial:
        (partial / "weights").write_text("new")
    assert {file.name for file in tmp_path.rglob("*")} == {"model", "weights"}


def test_folders_that_were_made_for_it_go_with_what_fails(tmp_path: Path) -> None:
    """And no others: neither what was there, nor what somebody else has put something into meanwhile."""
    (tmp_path / "was").mkdir()

    def fail(target: Path, error: Exception, beside: Path | None = None) -> None:
        with whole_or_nothing(target) as partial:
            (partial / "weights").write_text("new")
            if beside is not None:
                beside.write_text("other")
            raise error

    with pytest.raises(CheckpointError, match="model cannot be written: No space left"):
        fail(tmp_path / "was" / "new" / "sub" / "model", OSError(28, "No space left on device"))
    with pytest.raises(KeyError):
        fail(tmp_path / "shared" / "sub" / "model", KeyError(), tmp_path / "shared" / "file")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["shared", "shared/file", "was"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_stays_and_the_empty_folder_behind_it_is_written(tmp_path: Path, overwrite: bool) -> None:
    link = tmp_path / "link"
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    link.symlink_to(tmp_path / "disk" / "empty")
    with whole_or_nothing(link, overwrite=overwrite) as partial:
        assert partial.parent == tmp_path / "disk"
        (partial / "weights").write_text("new")
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "disk").rglob("*")] == ["empty", "weights"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["volume", "link"])
def test_a_mount_point_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, name: str
) -> None:
    """Nothing can be renamed to it. For a link to one `ismount` is False."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "volume")
    monkeypatch.setattr("os.path.ismount", lambda path: path == str(tmp_path / "volume"))
    with (
        pytest.raises(RequestError, match=rf"{name} is a mount point, .*such as .*{name}/model$"),
        whole_or_nothing(tmp_path / name, overwrite=overwrite),
    ):
        pytest.fail("it began")
    with whole_or_nothing(tmp_path / name / "model") as partial:
        (partial / "weights").write_text("new")
    assert [path.name for path in (tmp_path / "volume").rglob("*")] == ["model", "weights"]


def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "here"
    target.mkdir()
    monkeypatch.chdir(target)
    with whole_or_nothing(Path()) as partial:
        (partial / "weights").write_text("new")
    assert [file.name for file in tmp_path.rglob("*")] == ["here", "weights"]
    monkeypatch.chdir(tmp_path)
