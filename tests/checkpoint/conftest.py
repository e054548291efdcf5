import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import Hub, Locator, serving

from zimage.testing import build_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint in float32, one file per component. Not to be changed."""
    return build_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    with serving(tiny) as state:
        yield state


@pytest.fixture
def locate_anew(hub: Hub, tmp_path: Path) -> Locator:
    return Locator(hub, tmp_path / "home")
