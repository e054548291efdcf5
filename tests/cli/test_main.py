import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zimage.cli.checkpoints
from zimage import __version__
from zimage.variants import VARIANTS

HEAVY = {"torch", "numpy", "diffusers", "transformers", "PIL", "tqdm", "huggingface_hub", "rich"}
INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["generate", "--help"], ["replay", "--help"], ["bench", "--help"], ["variants"], ["--version"]],
)
def test_telling_about_itself_loads_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "zimage", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "zimage.cli" in imported
    assert not {name for name in imported if name.split(".")[0] in HEAVY}
    assert ended.stdout


def test_help_names_commands_and_exit_codes(zimage: Callable[..., Any]) -> None:
    ended = zimage("--help")
    assert (ended.code, ended.err) == (0, "")
    for word in ("generate", "replay", "variants", "inspect", "130"):
        assert word in ended.out


def test_version(zimage: Callable[..., Any]) -> None:
    assert zimage("--version").out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["generate", "--frobnicate", "x"], "No such option: --frobnicate"),
        (["generate", "fox", "--steps", "many"], "--steps"),
        (["replay"], "Missing argument"),
        (["inspect"], "Missing argument"),
    ],
)
def test_usage_errors_are_one_line(zimage: Callable[..., Any], arguments: list[str], said: str) -> None:
    ended = zimage(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("zimage: ")
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_no_command_shows_the_help(zimage: Callable[..., Any]) -> None:
    ended = zimage()
    assert ended.code == 2
    assert "Commands:" in ended.out


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (RuntimeError("bad\nluck\x1b"), 1, "zimage: RuntimeError: bad luck (zimage --debug ... shows where)\n"),
        (OSError(28, "No space left on device", "a.png"), 1, "zimage: [Errno 28] No space left on device: 'a.png'\n"),
        (zimage.errors.MissingExtra("install x"), 1, "zimage: install x\n"),
        (zimage.errors.CheckpointError("damaged"), 1, "zimage: damaged\n"),
        (zimage.errors.RequestError("wrong"), 2, "zimage: wrong\n"),
        (zimage.errors.Cancelled("cancelled"), 130, "zimage: cancelled\n"),
        (KeyboardInterrupt(), 130, "zimage: cancelled, nothing written\n"),
    ],
)
def test_every_failure_is_one_line_and_a_code(
    zimage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int, said: str
) -> None:
    def fail(*_: object) -> str:
        raise failure

    monkeypatch.setattr("zimage.cli.checkpoints.table", fail)
    ended = zimage("variants")
    assert (ended.code, ended.out, ended.err) == (code, "", said)


@pytest.mark.parametrize("module", ["typer", "torch"])
def test_an_interrupt_while_modules_are_imported(
    process: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path, module: str
) -> None:
    """Of the command itself, or what it needs; in a text that is run, which Python itself makes more of."""
    (tmp_path / f"{module}.py").write_text(f"import os, signal\nprint('begun')\nexec('{INTERRUPT}')\n")
    with process("generate", "a fox", "-m", "demo") as started:
        out, err = started.communicate()
    said = b"zimage: cancelled\n" if module == "typer" else b"zimage: cancelled, nothing written\n"
    assert (started.returncode, out, err) == (130, b"begun\n", said)


def test_an_interrupt_when_all_is_done(process: Callable[..., "subprocess.Popen[bytes]"], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import atexit, os, signal\natexit.register(lambda: {INTERRUPT})\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    with process("--version", env={**os.environ, "PYTHONPATH": path}) as started:
        out, err = started.communicate()
    assert (started.returncode, out, err) == (0, f"{__version__}\n".encode(), b"")


def test_debug_shows_where_an_error_comes_from(zimage: Callable[..., Any]) -> None:
    ended = zimage("--debug", "replay", "nothing.png")
    assert ended.code == 2
    assert "Traceback (most recent call last)" in ended.err
    assert ended.err.endswith("zimage: there is no file nothing.png\n")
    assert "Traceback" not in zimage("replay", "nothing.png").err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(process: Callable[..., "subprocess.Popen[bytes]"], unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with process("variants", stdout=writing, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}) as started:
        os.close(writing)
        _, err = started.communicate()
    assert (started.returncode, err) == (1, b"")


def test_variants_is_a_table_to_choose_from(zimage: Callable[..., Any]) -> None:
    lines = zimage("variants").out.splitlines()
    assert lines[0].split("  ")[0] == "name"
    assert lines[1].split() == ["base", "Z-Image", "50", "4", "100", "yes", "Tongyi-MAI/Z-Image"]
    assert lines[2].split() == ["turbo", "Z-Image-Turbo", "8", "0", "8", "no", "Tongyi-MAI/Z-Image-Turbo"]
    assert f"turbo: {VARIANTS['turbo'].advice}" in lines


def test_variants_as_json(zimage: Callable[..., Any]) -> None:
    found = [json.loads(line) for line in zimage("variants", "--json").out.splitlines()]
    assert [variant["name"] for variant in found] == list(VARIANTS)
    assert [variant["evaluations"] for variant in found] == [100, 8]
    assert found[0]["shift"] == 6.0


def test_inspect_says_what_a_folder_holds(zimage: Callable[..., Any], base: str) -> None:
    ended = zimage("inspect", base)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("variant: base (shift 6)\n")
    assert "ZImageTransformer2DModel" in ended.out
    found = json.loads(zimage("inspect", base, "--json").out)
    assert (found["variant"], found["problems"]) == ("base", [])
    assert f"fingerprint: {found['fingerprint']}\n" in ended.out


def test_inspect_knows_models_by_name(zimage: Callable[..., Any], tmp_path: Path) -> None:
    """And a folder of that name is the folder."""
    assert zimage("inspect", "demo-turbo").out.startswith("variant: turbo (shift 3, sampler dpmpp_2m)\n")
    ended = zimage("inspect", "nobody")
    assert (ended.code, ended.out) == (1, "")
    assert "cannot find the model 'nobody': there is no such folder here" in ended.err
    (tmp_path / "demo").mkdir()
    assert "\nproblem: " in zimage("inspect", "demo").out


def test_inspect_fails_where_there_are_problems(zimage: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ended = zimage("inspect", tmp_path / "empty")
    assert ended.code == 1
    assert "\nproblem: " in ended.out
    assert json.loads(zimage("inspect", tmp_path / "empty", "--json").out)["problems"]
    ended = zimage("inspect", tmp_path / "nothing")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.count("\n") == 1
