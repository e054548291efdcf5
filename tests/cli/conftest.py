import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from zimage.cli import main
from zimage.testing import build_checkpoint
from zimage.variants import Variant


@dataclass(frozen=True)
class Ended:
    """A finished command."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny checkpoints `my-turbo` and `my-base`."""
    folder = tmp_path_factory.mktemp("models")
    build_checkpoint(folder / "my-turbo")
    build_checkpoint(folder / "my-base", variant="base")
    return folder


@pytest.fixture
def turbo(models: Path) -> str:
    return str(models / "my-turbo")


@pytest.fixture
def base(models: Path) -> str:
    return str(models / "my-base")


@pytest.fixture
def zimage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process, in an empty folder, with no model chosen by the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZIMAGE_MODEL", raising=False)

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., "subprocess.Popen[bytes]"]:
    """Start the command as a process of its own in an empty folder, with pipes at its ends unless told otherwise."""

    def start(*arguments: object, **options: object) -> "subprocess.Popen[bytes]":
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        unset = ("ZIMAGE_MODEL", "PYTHONUNBUFFERED")
        environment = {key: value for key, value in os.environ.items() if key not in unset}
        command = [sys.executable, "-m", "zimage", *map(str, arguments)]
        interruptible = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        return subprocess.Popen(command, **{"cwd": tmp_path, "env": environment, **pipes, **interruptible, **options})  # type: ignore[call-overload,no-any-return]

    return start


def cached(cache: Path, variant: Variant, checkpoint: Path) -> None:
    """Put a checkpoint into a hub cache as if it were the released model."""
    repository = cache / f"models--{variant.hub_id.replace('/', '--')}"
    shutil.copytree(checkpoint, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
