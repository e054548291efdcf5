"""What the README, the guide and the examples say to type works as it stands, and the numbers in them are the code's.

Blocks run unchanged, in new processes, offline: a Hugging Face cache holds tiny checkpoints under the real hub ids.
Only the default size of pictures is made smaller, before zimage is used, and for the shell the default number of steps.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from zimage import VARIANTS, GenerationRequest, read_recipe
from zimage.testing import build_controlnet

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "guide.md", ROOT / "docs" / "demo.md", ROOT / "docs" / "relay.md"]
SMALLER = """
from dataclasses import replace
from zimage.variants import VARIANTS
VARIANTS.update({name: replace(variant, height=256, width=256) for name, variant in VARIANTS.items()})
"""
RUN_EACH = """
import runpy, sys
for file in sys.argv[1:]:
    sys.argv = [file]
    try:
        runpy.run_path(file, run_name="__main__")
    except BaseException as error:
        raise SystemExit(f"{file}: {type(error).__name__}: {error}") from error
"""


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def environment(turbo_folder: Path, base_folder: Path, tmp_path: Path) -> dict[str, str]:
    """Of a user whose cache holds both models, with a LoRA for them, and whose shell finds `zimage`."""
    for variant, folder in ((VARIANTS["turbo"], turbo_folder), (VARIANTS["base"], base_folder)):
        repository = tmp_path / "cache" / f"models--{variant.hub_id.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SMALLER)
    (tmp_path / "here").mkdir()
    halves = {"lora_A": torch.full((4, 64), 0.1), "lora_B": torch.full((64, 4), 0.1)}
    ink = {f"diffusion_model.layers.0.attention.to_v.{half}.weight": tensor for half, tensor in halves.items()}
    save_file(ink, tmp_path / "here" / "ink.safetensors")
    build_controlnet(tmp_path / "here" / "union.safetensors")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ZIMAGE_", "COV"))}
    return {
        **inherited,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path]),
    }


def run(command: list[str], environment: dict[str, str], folder: Path) -> str:
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.long
def test_python_blocks_and_examples_run(environment: dict[str, str], tmp_path: Path) -> None:
    here, files = tmp_path / "here", []
    for document in DOCUMENTS:
        for number, block in enumerate(blocks(document, "python"), start=1):
            files.append(tmp_path / f"{document.stem}-{number}.py")
            files[-1].write_text(block, encoding="utf-8")
    assert len(files) >= 6
    files += sorted((ROOT / "examples").glob("*.py"))
    printed = run([sys.executable, "-W", "error", "-c", RUN_EACH, *map(str, files)], environment, here)
    for said in ("ResolvedRequest(variant='base'", "8 of 8 sigma", "Z-Image-Turbo", "stopped the picture after step 4",
                 "the same bits again: True", "38 evaluations, Turbo from sigma 0.75"):  # fmt: skip
        assert said in printed
    assert {path.name for path in here.glob("*.png")} >= {
        "fox.png",
        "lighthouse.png",
        *map("picture-{}.png".format, range(4)),
    }
    with Image.open(here / "shapes.png") as sheet:
        assert sheet.width == 3 * sheet.height  # six by two squares, smaller ones here
    assert [read_recipe(here / f"picture-{k}.png").request.seed for k in range(4)] == [10, 11, 12, 13]
    assert (here / "model" / "model_index.json").is_file()
    ink, both, plain = (read_recipe(here / f"{name}.png") for name in ("ink", "both", "plain"))
    assert len({ink.pixels, both.pixels, plain.pixels}) == 3
    assert both.request.adapters == (("ink", 0.3), ("wash", 0.5))
    assert (here / "ink-comfyui.safetensors").is_file()
    wolf, looser, same = (read_recipe(here / f"{name}.png") for name in ("wolf", "looser", "same"))
    assert (wolf.controlnet["source"].endswith("union.safetensors"), same.controlnet) == (True, {})
    assert len({wolf.pixels, looser.pixels, same.pixels}) == 3
    assert looser.request.controlnet_conditioning_scale == 0.4


@pytest.mark.long
def test_shell_blocks_run(environment: dict[str, str], tmp_path: Path) -> None:
    here = tmp_path / "here"
    fewer = SMALLER.replace("height=256", "num_inference_steps=2, height=256")
    (tmp_path / "site" / "sitecustomize.py").write_text(fewer)
    script = "".join(block for document in DOCUMENTS for block in blocks(document, "sh"))
    assert script.count("zimage ") >= 4
    printed = run(["bash", "-euo", "pipefail", "-c", script], environment, here)
    shapes = read_recipe(here / "shapes.png")
    assert (shapes.model["source"], shapes.request.prompt) == ("demo", "a red circle left of a blue square")
    recipe = read_recipe(here / "fox.png")
    assert (recipe.request.prompt, recipe.request.seed, recipe.request.steps) == ("a red fox in snow", 7, 2)
    assert recipe.model["source"] == "Tongyi-MAI/Z-Image-Turbo"
    requests = [read_recipe(path).request for path in sorted(here.glob("harbour*.png"))]
    assert [(one.prompt, one.seed, one.width, one.height) for one in requests] == [
        ("a quiet harbour at dawn", 5, 1280, 720),
        ("a quiet harbour at dawn", 6, 1280, 720),
    ]
    assert "same bits" in printed.splitlines()


def test_the_guide_lists_every_option_with_its_default() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in guide.splitlines() if line.startswith("| `")
    ]
    columns = {name: row[2:] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    options = {field.name for field in fields(GenerationRequest)}
    assert set(columns) == options - {"any_size"}
    assert "`any_size=True`" in guide
    for name in ("height", "width", "num_inference_steps", "guidance_scale", "cfg_truncation", "max_sequence_length"):
        assert [float(cell) for cell in columns[name]] == [
            getattr(VARIANTS[model], name) for model in ("turbo", "base")
        ]
    assert columns["sampler"] == [f"`{VARIANTS[model].sampler}`" for model in ("turbo", "base")]
    assert columns["cfg_normalization"] == ["off", "off"]
    assert VARIANTS["turbo"].cfg_normalization == VARIANTS["base"].cfg_normalization == 0


def test_the_readme_counts_evaluations_right() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    turbo, base = VARIANTS["turbo"], VARIANTS["base"]
    assert f"| {turbo.evaluations} | {base.evaluations} ({base.num_inference_steps} steps, with guidance) |" in readme
    assert f"Turbo runs {turbo.evaluations} evaluations without guidance" in readme
    assert f"the base model {base.num_inference_steps} steps with guidance {base.guidance_scale:g}" in readme
