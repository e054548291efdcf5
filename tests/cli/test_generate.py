import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops
from torch import OutOfMemoryError, Tensor

from zimage import ZImagePipeline, read_recipe
from zimage.cli.running import cancel_on_interrupt, evaluations
from zimage.cli.targets import Targets
from zimage.files.atomic import FileError
from zimage.files.recipe import pixel_digest
from zimage.models.autoencoder import Autoencoder
from zimage.models.transformer import ZImageTransformer
from zimage.request import GenerationRequest
from zimage.variants import BASE, TURBO

from .conftest import cached

Process = Callable[..., "subprocess.Popen[bytes]"]
SMALL = ("--size", "256", "--steps", "2", "--dtype", "float32", "--device", "cpu")


def test_a_picture_is_what_the_library_makes(zimage: Callable[..., Any], turbo: str) -> None:
    ended = zimage("generate", "a fox", "-m", turbo, "--seed", "7", *SMALL)
    assert (ended.code, ended.out) == (0, "zimage-7.png\n")
    assert ended.err == "zimage: turbo, 2 steps, guidance 0, 256x256, seed 7, float32 on cpu\n"
    pipe = ZImagePipeline.from_pretrained(turbo, dtype="float32", device="cpu")
    expected = pipe("a fox", seed=7, height=256, width=256, num_inference_steps=2, progress=False).images[0]
    assert pixel_digest(Image.open("zimage-7.png")) == pixel_digest(expected)
    assert read_recipe("zimage-7.png") == expected.recipe


def test_memory_makes_a_plan_that_is_told(zimage: Callable[..., Any], turbo: str) -> None:
    ended = zimage("generate", "a fox", "-m", turbo, "--seed", "7", *SMALL, "--memory", "20MB")
    assert (ended.code, ended.out) == (0, "zimage-7.png\n")
    placement = "text encoder resident, transformer resident, decode with 1 level in strips"
    assert ended.err == f"zimage: turbo, 2 steps, guidance 0, 256x256, seed 7, float32 on cpu, {placement}\n"
    pipe = ZImagePipeline.from_pretrained(turbo, dtype="float32", device="cpu")
    whole = pipe("a fox", seed=7, height=256, width=256, num_inference_steps=2, progress=False).images[0]
    difference = ImageChops.difference(Image.open("zimage-7.png"), whole)
    assert max(most for _, most in difference.getextrema()) <= 1
    ended = zimage("replay", "zimage-7.png", "-m", turbo, "--memory", "20MB", "--quiet")
    assert ended.code == 0


@pytest.mark.parametrize(
    ("memory", "code", "said"),
    [
        ("much", 2, "memory must be 'auto' or an amount"),
        ("10MB", 1, "1024x1024 does not fit, nor does a smaller picture"),
    ],
)
def test_memory_that_cannot_be(zimage: Callable[..., Any], turbo: str, memory: str, code: int, said: str) -> None:
    ended = zimage("generate", "a fox", "-m", turbo, *SMALL, "--memory", memory)
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_every_option_arrives(zimage: Callable[..., Any], base: str) -> None:
    options = (
        *("--negative", "blurry", "--size", "256x288", "--num-inference-steps", "3", "--guidance-scale", "2.5"),
        *("--sampler", "heun", "--cfg-normalization", "true", "--cfg-truncation", "0.5", "--max-sequence-length", "99"),
        *("--diversity", "0.5"),
        *("--variant", "base", "--dtype", "float32", "--device", "cpu", "-n", "2", "--seed", "7", "--json", "--quiet"),
    )
    ended = zimage("generate", "a fox", "--model", base, "-o", "a.png", *options)
    assert (ended.code, ended.err) == (0, "")
    reports = [json.loads(line) for line in ended.out.splitlines()]
    assert [report["file"] for report in reports] == ["a-1.png", "a-2.png"]
    assert [report["request"]["seed"] for report in reports] == [7, 8]
    for report in reports:
        assert list(report) == ["file", "request", "model", "runtime", "pixels", "seconds", "evaluations"]
        assert report["request"] | {"seed": 0} == {
            "variant": "base",
            "prompt": "a fox",
            "negative_prompt": "blurry",
            "height": 288,
            "width": 256,
            "num_inference_steps": 3,
            "guidance_scale": 2.5,
            "cfg_normalization": 1.0,
            "cfg_truncation": 0.5,
            "seed": 0,
            "sampler": "heun",
            "shift": 6.0,
            "sigmas": [],
            "max_sequence_length": 99,
            "diversity": 0.5,
        }
        assert report["runtime"]["dtype"] == "float32"
        assert report["pixels"] == pixel_digest(Image.open(report["file"])) == read_recipe(report["file"]).pixels
        assert report["evaluations"] == 10
        assert 0 < report["seconds"] < 60


def test_what_is_not_given_is_the_models_recipe(zimage: Callable[..., Any], base: str, turbo: str) -> None:
    for model, steps, guidance in ((base, 50, 4.0), (turbo, 8, 0.0)):
        report = json.loads(zimage("generate", "a fox", "-m", model, "--size", "256", "--json").out)
        assert (report["request"]["num_inference_steps"], report["request"]["guidance_scale"]) == (steps, guidance)
        assert report["evaluations"] == (100 if model == base else 8)
        assert report["file"] == f"zimage-{report['request']['seed']}.png"


def test_any_size_and_no_recipe(zimage: Callable[..., Any], turbo: str) -> None:
    arguments = ("generate", "a fox", "-m", turbo, "--height", "16", "--width", "32", "--steps", "1", "-o", "a.png")
    refused = zimage(*arguments)
    assert refused.code == 2
    assert "Choose such a size, or pass --any-size" in refused.err
    report = json.loads(zimage(*arguments, "--any-size", "--no-recipe", "--json").out)
    with Image.open("a.png") as image:
        assert (image.size, image.info) == ((32, 16), {})
        assert report["pixels"] == pixel_digest(image)


def test_the_model_may_come_from_the_environment(
    zimage: Callable[..., Any], turbo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZIMAGE_MODEL", turbo)
    assert zimage("generate", "a fox", *SMALL, "-o", "a.png").out == "a.png\n"


def test_without_a_model_the_demo_draws_and_one_line_says_so(zimage: Callable[..., Any], tmp_path: Path) -> None:
    ended = zimage("generate", "a red circle", "--cache-dir", tmp_path, "--steps", "2", "--seed", "7", "--quiet")
    assert (ended.code, ended.out) == (0, "zimage-7.png\n")
    assert ended.err.startswith("zimage: no model was named and no whole one is in the cache: demo, a small one")
    assert ended.err.count("\n") == 1
    assert read_recipe("zimage-7.png").model["source"] == "demo"
    with Image.open("zimage-7.png") as image:
        assert image.size == (128, 128)


def test_a_model_taken_from_the_cache_asks_no_hub(
    zimage: Callable[..., Any], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(tmp_path / "cache", TURBO, models / "my-turbo")
    asked: list[Any] = []
    monkeypatch.setattr("zimage.checkpoint.hub.hf_hub_download", lambda *given, **_: asked.append(given))
    ended = zimage("generate", "a fox", "--cache-dir", tmp_path / "cache", "--seed", "7", *SMALL)
    assert (ended.code, ended.out, asked) == (0, "zimage-7.png\n", [])
    assert ended.err.startswith("zimage: no model was named: turbo, which is in the cache\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "turbo", "--guidance", "3"], "--guidance must be 0 for Z-Image-Turbo"),
        (["--model", "base", "--guidance", "nan"], "--guidance must be a number"),
        (["--model", "turbo", "--negative", "x"], "a negative prompt has no effect"),
        (["--model", "turbo", "--seed", "-1"], "seed must be"),
        (["--model", "turbo", "--count", "0"], "--count must be"),
        (["--model", "turbo", "--sampler", "ddim"], "sampler must be one of"),
        (["--model", "folder", "--size", "1000"], "try 992 or 1008"),
        (["--model", "turbo", "--size", "big"], "--size must be"),
        (["--model", "turbo", "-o", "there.png"], "(--force)"),
        (["--model", "turbo", "-o", "a.xyz"], ".xyz is no image format"),
        (["--model", "turbo", "--variant", "flux"], "variant must be one of"),
        (["--revision", "main"], "--revision is of a model on the hub"),
        (["--cache-dir", "nowhere", "--size", "big"], "--size must be"),
    ],
)
def test_what_cannot_work_is_refused_before_loading(
    zimage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], said: str
) -> None:
    def loads(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be loaded")

    (tmp_path / "there.png").touch()
    monkeypatch.setattr(ZImagePipeline, "from_pretrained", loads)
    ended = zimage("generate", "a fox", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1


def test_a_checkpoint_that_cannot_be_had_is_one_line(zimage: Callable[..., Any]) -> None:
    ended = zimage("generate", "a fox", "-m", "./nothing")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("zimage: ")
    assert ended.err.count("\n") == 1


@pytest.mark.filterwarnings("always::zimage.errors.ZImageWarning")
def test_a_prompt_that_is_cut_is_a_warning(zimage: Callable[..., Any], turbo: str) -> None:
    ended = zimage("generate", "one two three " * 9, "-m", turbo, *SMALL, "--max-sequence-length", "20", "-q")
    assert ended.code == 0
    assert ended.err.startswith("zimage: warning: the prompt has ")
    assert ended.err.count("\n") == 1


def test_progress_is_shown_on_a_terminal_and_the_prompt_read_from_a_pipe(
    process: Process, turbo: str, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with process("generate", "-m", turbo, *SMALL, "-o", "a.png", stderr=theirs) as started:
        os.close(theirs)
        started.stdin.write("ein Füchslein\n".encode())  # type: ignore[union-attr]
        started.stdin.close()  # type: ignore[union-attr]
        shown = b""
        while data := _read(ours):
            shown += data
        out = started.stdout.read()  # type: ignore[union-attr]
    assert (started.returncode, out) == (0, b"a.png\n")
    assert read_recipe(tmp_path / "a.png").request.prompt == "ein Füchslein"
    assert b"seed " in shown
    assert b"2/2" in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


def test_interrupting_stops_between_steps_and_writes_nothing(process: Process, turbo: str, tmp_path: Path) -> None:
    arguments = ("-m", turbo, "--size", "256", "--steps", "1000", "--sampler", "heun", "-o", "a.png")
    with process("generate", "a fox", *arguments) as started:
        assert b"1000 steps of heun" in started.stderr.readline()  # type: ignore[union-attr]
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=60)
    assert (started.returncode, out) == (130, b"")
    assert err.endswith(b"\nzimage: cancelled, nothing written\n")
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_interrupting_later_keeps_the_pictures_that_are_done(process: Process, turbo: str, tmp_path: Path) -> None:
    arguments = ("-m", turbo, *SMALL, "--seed", "7", "-n", "1000", "--quiet")
    with process("generate", "a fox", *arguments) as started:
        assert started.stdout.readline() == b"zimage-7.png\n"  # type: ignore[union-attr]
        started.send_signal(signal.SIGINT)
        out, err = started.communicate(timeout=60)
    written = 1 + out.count(b"\n")
    assert started.returncode == 130
    assert err.endswith(f"\nzimage: cancelled, {written} of 1000 pictures written\n".encode())
    assert len(list(tmp_path.iterdir())) == written
    assert read_recipe(tmp_path / f"zimage-{6 + written}.png").request.seed == 6 + written


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """As in a foreground; a shell's background jobs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_the_first_interrupt_asks_the_second_insists(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with cancel_on_interrupt() as event:
        assert not event.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert event.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "Ctrl-C again" in capfd.readouterr().err


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with cancel_on_interrupt() as event:
            os.kill(os.getpid(), signal.SIGINT)
            assert not event.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"guidance_scale": 0}, 10),
        ({}, 20),
        ({"sampler": "dpmpp_2m"}, 20),
        ({"sampler": "heun", "guidance_scale": 0}, 19),
        ({"sampler": "heun"}, 38),
        ({"cache": "balanced"}, 14),
        ({"cache": [0, 1, 2], "guidance_scale": 0}, 3),
        ({"cfg_truncation": 0.0}, 11),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 2}, 4),
    ],
)
def test_evaluations(asked: dict[str, Any], expected: int) -> None:
    request = GenerationRequest("a fox", **{"num_inference_steps": 10, **asked}).resolve(BASE)
    assert evaluations(request) == expected


def test_memory_that_ran_out_is_told(
    zimage: Callable[..., Any], turbo: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A decode that fails until it is done in strips: the picture is drawn, its file says how, and so does stderr."""
    decode = Autoencoder.decode

    def fails(self: Autoencoder, latents: Tensor, strip_levels: int = 0) -> Tensor:
        if strip_levels < 1:
            raise OutOfMemoryError("Tried to allocate 5.00 GiB")
        return decode(self, latents, strip_levels)

    monkeypatch.setattr(Autoencoder, "decode", fails)
    ended = zimage("generate", "a fox", "-m", turbo, "--seed", "7", *SMALL)
    assert ended.code == 0, ended.err
    said = "zimage: decoding ran out of memory at 256x256 (Tried to allocate 5.00 GiB); since then: "
    assert [line.startswith(said) for line in ended.err.splitlines()].count(True) >= 1
    assert read_recipe(tmp_path / "zimage-7.png").runtime["decode"] == "1 in strips"
    ended = zimage("replay", "zimage-7.png", "-m", turbo)
    assert ended.code == 0, ended.err
    assert said in ended.err
    monkeypatch.undo()


def test_a_file_is_written_beside_the_steps_of_the_next_picture(
    zimage: Callable[..., Any], turbo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file waits until the second picture is denoised; the last one has nothing to wait for."""
    steps, second = count(1), threading.Event()
    denoise, save = ZImageTransformer.denoise, Targets.save

    def counted(*given: Any) -> Tensor:
        if next(steps) == 3:
            second.set()
        return denoise(*given)

    def waits(targets: Targets, picture: Any, index: int, seed: int) -> Path:
        assert second.wait(timeout=60)
        return save(targets, picture, index, seed)

    monkeypatch.setattr(ZImageTransformer, "denoise", counted)
    monkeypatch.setattr(Targets, "save", waits)
    ended = zimage("generate", "a fox", "-m", turbo, "--seed", "7", "-n", "2", *SMALL)
    assert (ended.code, ended.out) == (0, "zimage-7.png\nzimage-8.png\n")
    monkeypatch.undo()


def test_a_file_that_cannot_be_written_ends_the_drawing(
    zimage: Callable[..., Any], turbo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, asked = Targets.save, list[int]()

    def full(targets: Targets, picture: Any, index: int, seed: int) -> Path:
        asked.append(index)
        if index == 1:
            raise FileError("the disk is full")
        return save(targets, picture, index, seed)

    monkeypatch.setattr(Targets, "save", full)
    ended = zimage("generate", "a fox", "-m", turbo, "--seed", "7", "-n", "50", *SMALL, "-q")
    assert (ended.code, ended.out, ended.err) == (2, "zimage-7.png\n", "zimage: the disk is full\n")
    assert asked == [0, 1]
    monkeypatch.undo()
