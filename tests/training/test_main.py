"""`python -m zimage.training`: the way from a checkpoint through a few steps to a checkpoint, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch

from zimage import ZImagePipeline
from zimage.checkpoint.inspect import inspect_checkpoint
from zimage.training import __main__ as command
from zimage.training import config, gathering
from zimage.training.config import CorrectionStage, DistillationStage, FlowStage, ModelSize
from zimage.training.corrections import load_corrections
from zimage.training.state import read_state

from .conftest import FLOW


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's model, in steps that take a moment."""
    stage = replace(FLOW, log_every=1)
    distillation = DistillationStage(scenes=FLOW.scenes, learning_rate=1e-4, matrix_rate=1e-4, log_every=1)
    correction = CorrectionStage(
        scenes=FLOW.scenes,
        matrix_rate=1e-4,
        log_every=1,
        teacher_steps=1,
        correction_share=1.0,
        corrected=1,
        gathered=1,
    )
    monkeypatch.setattr(
        config.Training,
        "__init__",
        lambda self: self.__dict__.update(
            size=ModelSize(), finishing=stage, distillation=distillation, correction=correction
        ),
    )
    monkeypatch.setattr(command, "FlowStage", lambda: stage)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
    command.main()


def last_layer(model: str | Path) -> torch.Tensor:
    pipe = ZImagePipeline.from_pretrained(model, dtype="float32", device="cpu")
    weight: torch.Tensor = pipe.transformer.layers[-1].feed_forward.w2.weight
    return weight


def embeddings(model: str | Path) -> torch.Tensor:
    pipe = ZImagePipeline.from_pretrained(model, dtype="float32", device="cpu")
    weight: torch.Tensor = pipe.text_encoder.model.embed_tokens.weight
    return weight


def test_from_the_demo_through_a_few_steps_to_a_checkpoint(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(FLOW, FlowStage)
    run(monkeypatch, "prepare", tmp_path)
    run(monkeypatch, "latents", tmp_path)
    run(monkeypatch, "flow", tmp_path, "--model", "demo", "--steps", 2, "--batch", 2)
    lines = [json.loads(line) for line in (tmp_path / "flow" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] < 0.6  # the demo has learned already
    run(monkeypatch, "export", tmp_path)
    assert ZImagePipeline.from_pretrained(tmp_path / "demo", device="cpu").limits.native_side == 128
    run(monkeypatch, "distill", tmp_path, "--model", "demo-turbo", "--steps", 2, "--batch", 2)
    run(monkeypatch, "export", tmp_path, "--variant", "turbo")
    told = [inspect_checkpoint(tmp_path / name) for name in ("demo", "demo-turbo")]
    assert [(one.sampler, one.guidance_scale) for one in told] == [(None, 2.0), ("dpmpp_2m", None)]
    student, earlier, teacher = map(last_layer, (tmp_path / "demo-turbo", "demo-turbo", tmp_path / "demo"))
    assert 0 < (student - earlier).norm() < 0.2 * (student - teacher).norm()
    teacherless = tmp_path / "teacherless"
    run(monkeypatch, "prepare", teacherless)
    shutil.copy(tmp_path / "latents.safetensors", teacherless)
    options = ("--teacher", tmp_path / "demo")
    run(monkeypatch, "distill", teacherless, *options, "--model", "demo-turbo", "--steps", 2, "--batch", 2)
    run(monkeypatch, "export", teacherless, *options, "--variant", "turbo")
    student = last_layer(teacherless / "demo-turbo")
    assert 0 < (student - earlier).norm() < 0.2 * (student - teacher).norm()
    words, of_teacher = map(embeddings, (teacherless / "demo-turbo", tmp_path / "demo"))
    assert torch.equal(words, of_teacher)
    assert not torch.equal(words, embeddings("demo"))
    capsys.readouterr()
    run(monkeypatch, "evaluate", tmp_path, "--count", 1, "--sampling-steps", 1, "--guidance", 0)
    figures = json.loads(capsys.readouterr().out)
    assert {"steps": 1, "sampler": "euler", "guidance": 0.0}.items() <= figures.items()
    assert set(figures) == {"steps", "sampler", "guidance", "single en", "single zh", "pair en", "pair zh"}


def test_the_demo_is_corrected(small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verdicts = cycle((False, True))
    monkeypatch.setattr(gathering, "ROUND", 2)
    monkeypatch.setattr(gathering.judge, "agrees", lambda *_: next(verdicts))
    run(monkeypatch, "prepare", tmp_path)
    run(monkeypatch, "latents", tmp_path)
    run(monkeypatch, "gather", tmp_path, "--teacher", "demo")
    found = load_corrections(tmp_path, 0)
    assert (found.rounds, found.drawn, found.wrong, len(found.changed.captions)) == (1, 4, 2, 1)
    run(monkeypatch, "gather", tmp_path, "--teacher", "demo", "--count", 2, "--resume")
    assert load_corrections(tmp_path, 0).rounds == 2
    options = ("--teacher", "demo", "--model", "demo-turbo", "--correct", "--steps", 2)
    run(monkeypatch, "distill", tmp_path, *options)
    lines = [json.loads(line) for line in (tmp_path / "turbo" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert json.loads(read_state(tmp_path / "turbo")[1]["stage"])["correction_share"] == 1.0
    assert 0 < lines[0]["loss"] < 0.5  # the demo goes nearly where its teacher does
    export = ("export", tmp_path, "--teacher", "demo", "--variant", "turbo")
    run(monkeypatch, *export)
    student, earlier, teacher = map(last_layer, (tmp_path / "demo-turbo", "demo-turbo", "demo"))
    assert 0 < (student - earlier).norm() < 0.2 * (student - teacher).norm()
    run(monkeypatch, *export, "--between", "demo-turbo")
    half_way = last_layer(tmp_path / "demo-turbo")
    # Two steps change few weights by more than bfloat16 tells apart, so what lies between is one of both for most.
    assert 0 < max((half_way - one).norm() for one in (earlier, student)) < (student - earlier).norm()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["flow", "nowhere"],
            "nowhere/tokenizer/tokenizer.json is missing; run the stage `tokenizer` or `prepare` first",
        ),
        (["latents", "nowhere", "--steps", "3"], "unrecognized arguments: --steps 3"),
        (["evaluate", "nowhere", "--model", "demo", "--variant", "turbo"], "--model names one; drop one"),
        (["paint", "nowhere"], "invalid choice: 'paint'"),
        (["export", "nowhere", "--between", "demo-turbo"], "--between is of two turbos"),
        (
            ["gather", "nowhere", "--teacher", "demo", "--resume"],
            "corrections.safetensors is missing; run the stage `gather` first",
        ),
        (["evaluate", "nowhere"], "state.safetensors is missing; run that stage first"),
        (["evaluate", "nowhere", "--model", "demo-turbo", "--sampling-steps", "0"], "from 1 to 1000, got 0"),
        (["evaluate", "nowhere", "--model", "demo-turbo", "--guidance", "3"], "must be 0 for Z-Image-Turbo, got 3"),
    ],
)
def test_what_cannot_work_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert said in f"{ended.value.code} {capsys.readouterr().err}"
