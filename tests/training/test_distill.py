"""Distillation: the lesson is where the guided teacher goes, and a few steps bring the student nearer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from zimage.sampling.guidance import guide
from zimage.sampling.schedule import shifted_sigmas
from zimage.training.config import DistillationStage, ModelSize
from zimage.training.corrections import LEVELS, Corrections, Ways
from zimage.training.distill import Captions, Lesson, Lessons, lesson_loss, own_way, train_turbo, way_loss
from zimage.training.flow import Batches, train_flow
from zimage.training.latents import load_latents
from zimage.training.models import Painter, half_precision, predict
from zimage.training.state import average_of, fill, read_state
from zimage.training.tokenizer import batch_of, load_tokenizer, tokens_of

from .conftest import FLOW

pytestmark = pytest.mark.no_cover  # every line is counted in other tests; here that takes a third of the time
CPU = torch.device("cpu")
STAGE = DistillationStage(
    steps=20, batch=4, scenes=16, warmup=2, learning_rate=2e-3, log_every=5, save_every=100, teacher_steps=2
)


@pytest.fixture(scope="module")
def trained(data: Path, size: ModelSize, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    train_flow(replace(FLOW, steps=30, learning_rate=5e-3), size, folder, data=data, progress=False)
    return folder


@pytest.fixture
def teacher(trained: Path, size: ModelSize) -> Painter:
    painter = Painter(size)
    fill(painter, average_of(trained), "the teacher")
    return painter


def test_a_few_steps_bring_the_student_nearer(teacher: Painter, data: Path, tmp_path: Path) -> None:
    stage = replace(STAGE, steps=40, batch=8, guidance_scale=6.0)
    train_turbo(stage, teacher, tmp_path, data=data, progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_a_resumed_run_has_the_bits_of_one_that_went_through(teacher: Painter, data: Path, tmp_path: Path) -> None:
    stage = replace(STAGE, steps=8)
    for name, until in (("through", None), ("parts", 3)):
        train_turbo(stage, teacher, tmp_path / name, data=data, progress=False, until=until)
    train_turbo(stage, teacher, tmp_path / "parts", data=data, progress=False, resume=True)
    through, parts = (read_state(tmp_path / name)[0] for name in ("through", "parts"))
    assert all(torch.equal(through[name], parts[name]) for name in through)


@pytest.mark.usefixtures("full_precision")
def test_the_lesson_is_where_the_guided_teacher_goes(data: Path, size: ModelSize) -> None:
    torch.manual_seed(0)
    painter = Painter(size).requires_grad_(False)
    for name, weight in painter.transformer.named_parameters():
        if "adaLN" in name or "all_final_layer" in name:
            nn.init.normal_(weight, std=0.2)
    tokenizer = load_tokenizer(data / "tokenizer")
    empty = batch_of(tokens_of(tokenizer, [""]))
    stage = replace(STAGE, guidance_scale=100.0)  # of weights that have learned nothing, whose captions hardly differ
    batch = Batches(stage, tokenizer, load_latents(data, 0), 0).of(1)
    levels = shifted_sigmas(8, 3.0)
    captions = Captions.of(painter, batch.ids, batch.lengths, empty, CPU)
    for place in (0, 7):
        latents = (1 - levels[place]) * batch.latents + levels[place] * batch.noise
        lesson = Lesson.of(painter.transformer, captions, latents, torch.full((4,), place), stage)
        middle = (levels[place] + levels[place + 1]) / 2
        for sigma, after in ((levels[place], middle), (middle, levels[place + 1])):
            with torch.no_grad(), half_precision(CPU):
                features = painter.text_encoder(batch.ids).last_hidden_state
                positive = predict(painter.transformer, features, batch.lengths, latents, (1 - sigma).expand(4))
                nothing = painter.text_encoder(empty[0].expand(4, -1)).last_hidden_state
                negative = predict(painter.transformer, nothing, empty[1] * 4, latents, (1 - sigma).expand(4))
            latents = latents + (after - sigma) * guide(positive, negative, 100.0)
        landed = lesson.noisy + (levels[place + 1] - levels[place]) * lesson.target
        assert (landed - latents).abs().max() < 1e-4 * latents.abs().max()


def test_the_loss_is_zero_where_one_step_ends_where_the_teacher_does(data: Path, size: ModelSize) -> None:
    """Without guidance and in one step the teacher does what the student does."""
    torch.manual_seed(0)
    painter = Painter(size).requires_grad_(False)
    nn.init.normal_(painter.transformer.all_final_layer["2-1"].linear.weight, std=0.2)
    tokenizer = load_tokenizer(data / "tokenizer")
    stage = replace(STAGE, guidance_scale=0.0, teacher_steps=1)
    batch = Batches(stage, tokenizer, load_latents(data, 0), 0).of(2)
    captions = Captions.of(painter, batch.ids, batch.lengths, batch_of(tokens_of(tokenizer, [""])), CPU)
    lesson = Lesson.of(painter.transformer, captions, batch.latents, torch.tensor([0, 3, 5, 7]), stage)
    assert lesson.target.std() > 0.1
    assert lesson_loss(painter.transformer, lesson) < 1e-4


def test_lessons_begin_at_noisy_scenes_and_where_the_student_itself_gets_to(
    teacher: Painter, data: Path, size: ModelSize
) -> None:
    stage = replace(STAGE, batch=16, own_share=0.3)
    tokenizer = load_tokenizer(data / "tokenizer")
    batches, student = Batches(stage, tokenizer, load_latents(data, 0), 0), Painter(size).requires_grad_(False)
    nn.init.normal_(student.transformer.all_final_layer["2-1"].linear.weight, std=0.2)
    lessons, levels = Lessons(teacher, student.transformer, batches, CPU), shifted_sigmas(8, 3.0)
    for step in (1, 3):
        lesson, batch = lessons.of(step), batches.of(step)
        sigmas = lesson.sigmas[:, None, None, None]
        torch.testing.assert_close(lesson.noisy, (1 - sigmas) * batch.latents + sigmas * batch.noise)
        assert lesson.captions.lengths == batch.lengths
    for step in (2, 5):
        lesson, batch = lessons.of(step), batches.of(step)
        assert lesson.captions.lengths == batch.lengths[:2] * LEVELS
        assert torch.equal(lesson.sigmas, levels[:-1].repeat_interleave(2))
        way = lesson.noisy.unflatten(0, (LEVELS, 2))
        assert torch.equal(way[0], batch.noise[:2])
        with torch.no_grad(), half_precision(CPU):
            features = teacher.text_encoder(batch.ids[:2]).last_hidden_state
            for number in range(LEVELS - 1):
                start, end = levels[number], levels[number + 1]
                at = (1 - start).expand(2)
                velocity = predict(student.transformer, features, batch.lengths[:2], way[number], at)
                torch.testing.assert_close(way[number + 1], way[number] + (end - start) * velocity)


def corrections_of(teacher: Painter, data: Path) -> Corrections:
    """The ways of a student that follows its teacher for half of the captions, and stands still for the others."""
    tokenizer, texts = load_tokenizer(data / "tokenizer"), ["a red circle", "蓝色的星形", "a ring", "a green star"]
    noise = torch.randn(4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        passed = own_way(teacher.transformer, Captions.of_texts(teacher, tokenizer, texts, CPU), noise, LEVELS)
    return Corrections(Ways(texts, torch.stack(passed, dim=1)), Ways(texts[:2], noise[:2, None].repeat(1, 9, 1, 1, 1)))


def test_the_loss_of_a_way_is_its_distance_at_all_levels(teacher: Painter, data: Path) -> None:
    ways = corrections_of(teacher, data).changed
    captions = Captions.of_texts(teacher, load_tokenizer(data / "tokenizer"), ways.captions, CPU)
    assert way_loss(teacher.transformer, captions, ways.latents) < 1e-8
    for level, loss in ((1, 0.25 / 8), (8, 0.25 / 8)):
        moved = ways.latents.clone()
        moved[:, level] += 0.5
        torch.testing.assert_close(way_loss(teacher.transformer, captions, moved), torch.tensor(loss))


@pytest.mark.usefixtures("full_precision")
def test_every_step_of_the_way_learns_from_its_end(teacher: Painter, data: Path, size: ModelSize) -> None:
    """The gradient is that of the picture by the weights, through all steps: a small move of weights shows it."""
    ways = corrections_of(teacher, data).changed
    captions = Captions.of_texts(teacher, load_tokenizer(data / "tokenizer"), ways.captions, CPU)
    student = Painter(size).transformer
    fill(student, teacher.transformer.state_dict(), "the student")
    bias = student.all_final_layer["2-1"].linear.bias
    bias.data += 0.1
    loss = way_loss(student, captions, ways.latents)
    loss.backward()
    with torch.no_grad():
        step = 1e-3 * bias.grad / bias.grad.norm()
        bias += step
        gained = way_loss(student, captions, ways.latents).item() - loss.item()
    assert gained == pytest.approx((step * bias.grad).sum().item(), rel=0.1)


def test_corrections_are_learned_and_what_is_kept_beside_them(teacher: Painter, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    corrections_of(teacher, data).save(folder, 0)
    stage = replace(STAGE, steps=20, correction_share=1.0, corrected=2)
    train_turbo(stage, teacher, tmp_path / "run", data=folder, progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_a_share_of_the_steps_are_corrections(teacher: Painter, data: Path, size: ModelSize) -> None:
    stage = replace(STAGE, correction_share=0.4, corrected=3)
    student = Painter(size).requires_grad_(False)
    batches = Batches(stage, load_tokenizer(data / "tokenizer"), load_latents(data, 0), 0)
    corrections = corrections_of(teacher, data)
    lessons = Lessons(teacher, student.transformer, batches, CPU, corrections)
    plain = Lessons(teacher, student.transformer, batches, CPU)
    same = [torch.equal(lessons.losses(step)["loss"], plain.losses(step)["loss"]) for step in range(20)]
    assert 8 <= sum(same) <= 16
    step = same.index(False)
    kept = way_distance(corrections.kept)
    assert kept == 0.0
    changed = [way_distance(Ways(["a"], way[None])) for way in corrections.changed.latents]
    assert min(changed) / 2 <= lessons.losses(step)["loss"].item() <= max(changed) / 2


def way_distance(ways: Ways) -> float:
    """The loss of a student that stands still, as one does whose last layer is zero."""
    return (ways.latents[:, 1:] - ways.latents[:, :1]).square().mean().item()
