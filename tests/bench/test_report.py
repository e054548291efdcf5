"""The table, and the file that a result is kept in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from zimage.bench import report as reports
from zimage.bench.report import Report, Stage, Timing, save, text

OURS = Timing(
    median_s=0.5, quartiles_s=(0.4, 0.6), times_s=(0.4, 0.5, 0.6), evaluations=8, prompts=1, tflops=4.0,
    product_share=0.5, peak_bytes=None,
)  # fmt: skip
THEIRS = replace(OURS, median_s=1.25, quartiles_s=(1.2, 1.3), tflops=1.6, product_share=0.2)
REPORT = Report(
    model={
        "name": "models/My Model",
        "weights": "given",
        "variant": "base",
        "dtype": "bfloat16",
        "blocks": "eager",
        "layers": "full",
    },
    picture={"width": 1280, "height": 720, "steps": 4, "guidance_scale": 4.0},
    rounds=3,
    machine={"device": "cuda", "name": "NVIDIA H100 80GB", "threads": 8},
    versions={},
    date="2026-11-26",
    limits={"product_tflops": 8.0, "products": {"4x4x4": 8.0, "2x2x2": 1.0}, "copy_gbs": 1234.0},
    stages=(Stage(name="denoise", tflop=2.0, zimage=OURS, diffusers=THEIRS, ratio=2.5, cosine=0.9995),),
    attention={"zimage": {"flash": 12}, "diffusers": {"math": 6, "kernel:x": 1}},
)


def test_the_table_says_it_all() -> None:
    assert text(REPORT).splitlines() == [
        "models/My Model, base: 1280x720, 4 steps, guidance 4, bfloat16 on NVIDIA H100 80GB, 8 threads",
        "medians of 3 rounds (quartiles), both sides in turn, warm",
        "stage    zimage               diffusers            ratio  cosine    evaluations  zimage's TFLOP/s  share",
        "denoise  500 ms (400 to 600)  1.25 s (1.2 to 1.3)  2.50   0.999500  8 = 8        4                 50%",
        "matrix product: 8 TFLOP/s (4x4x4 8, 2x2x2 1); the share is of this",
        "copy: 1.23e+03 GB/s, read and written",
        "attention of zimage: flash x 12",
        "attention of diffusers: math x 6, kernel:x x 1",
    ]


def test_compiled_blocks_are_said_and_named(tmp_path: Path) -> None:
    compiled = replace(REPORT, model={**REPORT.model, "blocks": "compiled"})
    assert "guidance 4, bfloat16, blocks compiled on NVIDIA" in text(compiled)
    assert save(compiled, tmp_path).name == save(REPORT, tmp_path).name.replace("bfloat16", "bfloat16-compiled")
    graphs = replace(REPORT, model={**REPORT.model, "blocks": "compiled, CUDA graphs"})
    assert "guidance 4, bfloat16, blocks compiled, CUDA graphs on NVIDIA" in text(graphs)
    assert "bfloat16-compiled-cuda-graphs-nvidia" in save(graphs, tmp_path).name


def test_rounded_layers_are_said_and_named(tmp_path: Path) -> None:
    rounded = replace(REPORT, model={**REPORT.model, "layers": "weights and activations in int8"})
    assert "guidance 4, bfloat16 (zimage's layers: weights and activations in int8) on NVIDIA" in text(rounded)
    named = save(REPORT, tmp_path).name.replace("bfloat16", "bfloat16-weights-and-activations-in-int8")
    assert save(rounded, tmp_path).name == named


def test_one_side_alone_and_memory() -> None:
    gib = 2**30
    both = replace(
        REPORT.stages[0], zimage=replace(OURS, peak_bytes=3 * gib), diffusers=replace(THEIRS, peak_bytes=gib)
    )
    assert text(replace(REPORT, stages=(both,))).splitlines()[-1] == (
        "peak memory in GiB, zimage / diffusers: denoise 3.00 / 1.00"
    )
    alone = replace(REPORT.stages[0], diffusers=None, ratio=None, cosine=None, step_cosine=0.9999)
    lines = text(replace(REPORT, stages=(alone,))).splitlines()
    assert lines[3].split() == ["denoise", "500", "ms", "(400", "to", "600)", "-", "-", "-", "8", "4", "50%"]
    assert "each step of denoise from the same latents: cosine 0.999900 or more" in lines


def test_a_result_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "results"
    path = save(REPORT, folder)
    assert path.name == "bench-my-model-base-1280x720-bfloat16-nvidia-h100-80gb-2026-11-26.json"
    assert json.loads(path.read_text()) == REPORT.to_dict()
    assert save(replace(REPORT, rounds=4), folder) == path
    assert json.loads(path.read_text())["rounds"] == 4

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("no disk")

    monkeypatch.setattr(reports.json, "dumps", fail)
    with pytest.raises(RuntimeError, match="no disk"):
        reports.write({}, folder, path.stem)
    monkeypatch.undo()
    assert json.loads(path.read_text())["rounds"] == 4
    assert list(folder.iterdir()) == [path]
