import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from zimage import VARIANTS, GenerationRequest, ZImagePipeline, read_recipe
from zimage.files.png import Picture, save_png
from zimage.files.recipe import Recipe, pixel_digest


@pytest.fixture(scope="session")
def drawn(models: Path) -> Picture:
    """A picture in bfloat16 with guidance, three steps."""
    pipe = ZImagePipeline.from_pretrained(models / "my-base", dtype="bfloat16", device="cpu")
    image = pipe("ein Fuchs", seed=7, height=256, width=256, num_inference_steps=3, progress=False).images[0]
    assert isinstance(image, Picture)
    return image


@pytest.fixture
def file(drawn: Picture, tmp_path: Path) -> Path:
    drawn.save(tmp_path / "fox.png")
    return tmp_path / "fox.png"


def recipe_of(image: Picture) -> Recipe:
    assert image.recipe is not None
    return image.recipe


def test_a_picture_comes_out_the_same_from_its_file_alone(zimage: Callable[..., Any], file: Path) -> None:
    ended = zimage("replay", file.name, "-o", "again.png")
    assert (ended.code, ended.out) == (0, "again.png\nsame bits\n")
    assert ended.err == "zimage: base, 3 steps, guidance 4, 256x256, seed 7, bfloat16 on cpu\n"
    assert (file.parent / "again.png").read_bytes() == file.read_bytes()


def test_replay_as_json(zimage: Callable[..., Any], file: Path) -> None:
    ended = zimage("replay", file, "--json", "-q")
    assert (ended.code, ended.err) == (0, "")
    report = json.loads(ended.out)
    assert list(report)[:4] == ["file", "output", "same_bits", "differences"]
    assert (report["output"], report["same_bits"], report["differences"]) == (None, True, [])
    assert report["pixels"] == read_recipe(file).pixels
    assert report["evaluations"] == 6
    assert [path.name for path in file.parent.iterdir()] == ["fox.png"]


def test_a_relays_picture_is_said_to_be_one(zimage: Callable[..., Any], drawn: Picture, tmp_path: Path) -> None:
    recipe = recipe_of(drawn)
    request = GenerationRequest("ein Fuchs", seed=7, height=256, width=256, any_size=True).resolve(VARIANTS["turbo"])
    turbo = replace(recipe, request=request, model={**recipe.model, "variant": "turbo"})
    save_png(drawn, tmp_path / "relay.png", replace(recipe, handover=0.75, turbo=turbo))
    ended = zimage("replay", tmp_path / "relay.png")
    assert (ended.code, ended.out) == (2, "")
    assert "made by a relay of two models" in ended.err


@pytest.mark.parametrize("name", ["float8", "_sage_qk_int8_pv_fp16_triton", "flash"])
def test_attention_in_8_bits_is_asked_for_again(
    zimage: Callable[..., Any], drawn: Picture, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other backends differ by their last bits; where there is none, what it was is told."""
    asked: list[str] = []
    own = ZImagePipeline.set_attention_backend

    def note(pipe: ZImagePipeline, backend: str) -> None:
        asked.append(backend)
        own(pipe, backend)

    monkeypatch.setattr(ZImagePipeline, "set_attention_backend", note)
    recipe = recipe_of(drawn)
    runtime = {**recipe.runtime, "attention": name}
    save_png(drawn, tmp_path / "a.png", replace(recipe, pixels="0" * 64, runtime=runtime))
    ended = zimage("replay", tmp_path / "a.png", "-q")
    assert (ended.code, ended.err) == (1, "")
    assert f"  attention was {name}, here it is native\n" in ended.out
    assert asked == ([] if name == "flash" else [name])


def test_other_bits_are_told_with_what_differs(zimage: Callable[..., Any], drawn: Picture, tmp_path: Path) -> None:
    other = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    recipe = recipe_of(drawn)
    runtime = {**recipe.runtime, "torch": "2.6.0"}
    save_png(other, tmp_path / "a.png", replace(recipe, pixels=pixel_digest(other), runtime=runtime))
    ended = zimage("replay", tmp_path / "a.png", "-q")
    assert ended.code == 1
    assert ended.out == f"not the same bits\n  torch was 2.6.0, here it is {torch.__version__}\n"
    save_png(other, tmp_path / "b.png", replace(recipe, pixels=pixel_digest(other)))
    ended = zimage("replay", tmp_path / "b.png", "-q")
    assert (ended.code, ended.out) == (1, "not the same bits\n  nothing that the recipe records is different\n")


def test_a_picture_edited_by_another_program_is_not_the_same(
    zimage: Callable[..., Any], drawn: Picture, tmp_path: Path
) -> None:
    edited = drawn.copy()
    ImageDraw.Draw(edited).line((0, 0, 9, 9), "red")
    save_png(edited, tmp_path / "a.png", recipe_of(drawn))
    ended = zimage("replay", "a.png", "-q")
    said = "not the same bits\n  the picture in a.png was changed after it was made\n"
    assert (ended.code, ended.out) == (1, said)
    ended = zimage("replay", "a.png", "-o", "a.png", "--force", "-q")
    assert (ended.code, ended.out) == (1, f"a.png\n{said}")
    assert zimage("replay", "a.png", "-q").out == "same bits\n"


def test_dtype_device_and_threads_are_those_of_the_file(
    zimage: Callable[..., Any], drawn: Picture, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    recorded = recipe_of(drawn)
    recipe = replace(recorded, runtime={**recorded.runtime, "threads": "1", "dtype": "float32"})
    save_png(drawn, tmp_path / "a.png", recipe)
    try:
        report = json.loads(zimage("replay", "a.png", "--json").out)
    finally:
        torch.set_num_threads(threads)
    assert report["runtime"]["threads"] == "1"
    assert report["runtime"]["dtype"] == "float32"
    assert report["same_bits"] is False
    assert report["differences"] == []


@pytest.mark.parametrize(
    "runtime", [{}, {"threads": "0", "dtype": "float64", "device": "NVIDIA H200"}, {"threads": "9" * 4000}]
)
def test_a_runtime_that_cannot_be_had_is_left_out(
    zimage: Callable[..., Any], drawn: Picture, tmp_path: Path, runtime: dict[str, str]
) -> None:
    threads = torch.get_num_threads()
    save_png(drawn, tmp_path / "a.png", replace(recipe_of(drawn), runtime=runtime))
    ended = zimage("replay", "a.png", "-q", "--device", "cpu")
    assert ended.code in (0, 1)
    assert ended.out.startswith(("same bits", "not the same bits"))
    assert torch.get_num_threads() == threads


def test_output_is_checked_before_loading(zimage: Callable[..., Any], file: Path) -> None:
    ended = zimage("replay", file, "-o", file, "--model", "./nothing")
    assert (ended.code, ended.out) == (2, "")
    assert "exists already" in ended.err
    before = file.read_bytes()
    assert zimage("replay", file, "-o", file, "--force").code == 0
    assert file.read_bytes() == before


def test_a_folder_takes_the_files_name(zimage: Callable[..., Any], file: Path) -> None:
    (file.parent / "folder").mkdir()
    assert zimage("replay", file, "-o", "folder").out == "folder/fox.png\nsame bits\n"


def test_files_that_cannot_be_replayed(zimage: Callable[..., Any], drawn: Picture, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8")
    recipe = recipe_of(drawn)
    save_png(drawn, tmp_path / "plain.png", None)
    save_png(drawn, tmp_path / "latents.png", replace(recipe, given=("latents",)))
    save_png(drawn, tmp_path / "unknown.png", replace(recipe, model={**recipe.model, "source": ""}))
    save_png(drawn, tmp_path / "share.png", replace(recipe, model={**recipe.model, "source": r"\\server\share"}))
    save_png(drawn, tmp_path / "share-vae.png", replace(recipe, model={**recipe.model, "vae": "//server/share/a.gguf"}))
    for name, said in {
        "a.jpg": "is not a PNG file",
        "nothing.png": "there is no file",
        "plain.png": "has no zimage recipe",
        "latents.png": "was made from latents, which the file does not hold",
        "unknown.png": "does not say which model it was made with; pass --model",
        "share.png": "on another machine",
        "share-vae.png": "on another machine, //server/share/a.gguf",
    }.items():
        ended = zimage("replay", name)
        assert (ended.code, ended.out) == (2, "")
        assert said in ended.err
        assert ended.err.count("\n") == 1


def test_another_model_can_be_given(zimage: Callable[..., Any], drawn: Picture, tmp_path: Path, base: str) -> None:
    recipe = recipe_of(drawn)
    save_png(drawn, tmp_path / "a.png", replace(recipe, model={**recipe.model, "source": "someone/fine-tune"}))
    ended = zimage("replay", "a.png", "--model", base, "-q")
    assert (ended.code, ended.out) == (0, "same bits\n")


def test_a_model_of_the_other_variant_is_named_before_it_is_loaded(
    zimage: Callable[..., Any], drawn: Picture, file: Path, turbo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "zimage: the picture was made by a base model, and {} is a turbo model; pass a base model as --model\n"
    with monkeypatch.context() as patched:
        patched.setattr(ZImagePipeline, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
        for other in (turbo, "turbo", "demo-turbo"):
            ended = zimage("replay", file, "--model", other, "-q")
            assert (ended.code, ended.out, ended.err) == (2, "", said.format(other))
    # one on the hub is known by what was loaded
    own = ZImagePipeline.from_pretrained
    monkeypatch.setattr(ZImagePipeline, "from_pretrained", lambda _, **options: own(turbo, **options))
    assert zimage("replay", file, "--model", "someone/model", "-q").err == said.format("someone/model")
    # whoever draws with the schedule of the other variant means it
    request = replace(recipe_of(drawn).request, shift=VARIANTS["turbo"].shift)
    save_png(drawn, file.with_name("own.png"), replace(recipe_of(drawn), request=request))
    assert zimage("replay", "own.png", "--model", turbo, "-q").code == 1


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A hub that has nothing: its address, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


REPLAY_EACH = """
import sys
from zimage.cli import main
for line in sys.stdin:
    try:
        main(["replay", *line.split()])
    except SystemExit as ended:
        print(ended.code, flush=True)
"""


def test_a_file_cannot_make_anyone_download_a_model(drawn: Picture, tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    """In a process of its own, since huggingface_hub reads its settings once."""
    recipe = recipe_of(drawn)
    address, asked = hub
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    released = {"source": "Tongyi-MAI/Z-Image-Turbo", "vae": "someone/model/file.safetensors"}
    save_png(drawn, tmp_path / "released.png", replace(recipe, model={**recipe.model, **released}))
    save_png(drawn, tmp_path / "other.png", replace(recipe, model={**recipe.model, "source": "someone/model"}))
    command, pipe = [sys.executable, "-c", REPLAY_EACH], subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1
    ) as started:
        assert started.stdin is not None
        assert started.stdout is not None
        for line, may_ask in (("released.png", False), ("other.png", False), ("other.png --model someone/model", True)):
            started.stdin.write(line + "\n")
            assert started.stdout.readline() == "1\n"
            assert bool(asked) == may_ask
        _, err = started.communicate()
    assert started.returncode == 0
    released_said, other_said, _ = err.splitlines()
    assert "pass --model, --vae to download it" in released_said
    assert "pass --model to download it" in other_said


def test_a_picture_from_an_image_needs_it_again(zimage: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    Image.effect_mandelbrot((256, 272), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "in.png")
    mask = Image.new("L", (256, 272))
    mask.paste(255, (128, 0, 256, 272))
    mask.save(tmp_path / "mask.png")
    made = ("-m", str(models / "my-base"), "--steps", "4", "--seed", "3", "-o", "out.png", "--json")
    edits = ("--image", "in.png", "--mask", "mask.png", "--strength", "0.5", "--keep-steps", "--padding", "16,0,0,0")
    ended = zimage("generate", "a fox", *made, *edits)
    assert ended.code == 0, ended.err
    assert "4 steps, from an image at strength 0.5, guidance 4, 272x272" in ended.err
    report = json.loads(ended.out)
    asked = report["request"]
    assert (asked["strength"], asked["keep_steps"], asked["padding"]) == (0.5, True, [16, 0, 0, 0])
    assert (asked["image"]["width"], asked["mask_image"]["height"]) == (256, 272)
    assert report["evaluations"] == 8
    with Image.open(tmp_path / "out.png") as image, Image.open(tmp_path / "in.png") as before:
        assert image.crop((16, 0, 144, 272)).tobytes() == before.crop((0, 0, 128, 272)).tobytes()
    ended = zimage("replay", "out.png", "--image", "in.png", "--mask-image", "mask.png")
    assert (ended.code, ended.out) == (0, "same bits\n"), ended.err
    for images, said in ((("--image", "in.png"), "pass --mask"), ((), "pass --image"),
                         (("--image", "out.png", "--mask", "mask.png"), "this image is not the one")):  # fmt: skip
        ended = zimage("replay", "out.png", *images)
        assert (ended.code, ended.out) == (2, "")
        assert said in ended.err


@pytest.mark.filterwarnings("default:.*round activations")
def test_rounded_activations_are_replayed(zimage: Callable[..., Any], models: Path, tmp_path: Path) -> None:
    """As they were drawn: with the same bits, which weights alone do not give."""
    drawing = ("generate", "a fox", "-m", models / "my-turbo", "--size", 64, "--any-size", "--steps", 2, "--seed", 3)
    place = ("--device", "cpu", "--dtype", "float32", "--weight-dtype", "int8", "-q")
    warned = "zimage: warning: 7 of 7 layers that round activations widen them again on cpu"
    ended = zimage(*drawing, *place, "--quantize-activations", "-o", "both.png")
    assert ended.code == 0
    assert ended.err.startswith(warned)
    assert "than without --quantize-activations\n" in ended.err
    recipe = read_recipe(tmp_path / "both.png")
    assert (recipe.runtime["weights"], recipe.runtime["activations"]) == ("int8", "int8")
    ended = zimage("replay", "both.png", "-q")
    assert (ended.code, ended.out) == (0, "same bits\n")
    assert ended.err.startswith(warned)
    assert zimage(*drawing, *place, "-o", "weights.png").code == 0
    weights = read_recipe(tmp_path / "weights.png")
    assert weights.runtime["activations"] == "full"
    assert weights.pixels != recipe.pixels
    assert zimage("replay", "weights.png", "-q").out == "same bits\n"
