"""What is gathered is where the student is wrong and its teacher right from the same noise, and the same each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zimage import RequestError, ZImagePipeline
from zimage.models.autoencoder import to_image
from zimage.training import gathering
from zimage.training.config import DistillationStage, ModelSize
from zimage.training.corrections import LEVELS, Corrections, load_corrections
from zimage.training.distill import Captions, Lesson, levels_of, own_way
from zimage.training.gathering import gather
from zimage.training.models import Painter, make_pipeline
from zimage.training.state import fill
from zimage.training.world import Claims

from .conftest import compute_in_float32

CPU = torch.device("cpu")
STAGE = DistillationStage(teacher_steps=1)


def is_right(picture: Any, claims: Claims) -> bool:
    """Stands for the judge: right is what is brighter on its left, about half of untrained models' pictures, which no
    machine's last bits decide."""
    assert claims.exact
    left, right = np.split(np.asarray(picture).astype(int), 2, axis=1)
    return bool(left.sum() > right.sum())


def painter_of(size: ModelSize, seed: int) -> Painter:
    torch.manual_seed(seed)
    painter = Painter(size).requires_grad_(False)
    for name, weight in painter.transformer.named_parameters():
        if "adaLN" in name or "all_final_layer" in name:
            nn.init.normal_(weight, std=0.2)
    return painter


@pytest.fixture(scope="module")
def teacher(size: ModelSize) -> Painter:
    return painter_of(size, 0)


@pytest.fixture(scope="module")
def student(size: ModelSize, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "turbo"
    parts = data / "tokenizer", data / "autoencoder" / "vae"
    make_pipeline(painter_of(size, 1), *parts, variant="turbo", dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(
    teacher: Painter, student: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Corrections]]:
    folder = tmp_path_factory.mktemp("found")

    def found(name: str, count: int, **options: Any) -> Corrections:
        gather(STAGE, teacher, str(student), folder / name, count=count, seed=3, progress=False, **options)
        return load_corrections(folder / name, 3)

    with pytest.MonkeyPatch.context() as patch:
        compute_in_float32(patch)  # untrained ways part by bfloat16's rounding
        patch.setattr(gathering, "ROUND", 2)
        patch.setattr(gathering.judge, "read", lambda picture: picture)
        patch.setattr(gathering.judge, "agrees", is_right)
        yield found


@pytest.fixture(scope="module")
def through(found: Callable[..., Corrections]) -> Corrections:
    return found("through", 3)


def test_the_student_is_wrong_and_its_teacher_right(
    through: Corrections, teacher: Painter, student: Path, size: ModelSize
) -> None:
    changed, kept = through.changed, through.kept
    assert 3 <= len(changed.captions) == len(changed.latents) < 5
    assert len(kept.captions) == len(kept.latents) == len(changed.latents)
    assert through.wrong == 2 * through.rounds < through.drawn
    pipe = ZImagePipeline.from_pretrained(student, dtype="float32", device="cpu")
    pupil = Painter(size).transformer.requires_grad_(False)
    fill(pupil, pipe.transformer.state_dict(), "the student")

    def captions(texts: list[str]) -> Captions:
        return Captions.of_texts(teacher, pipe.text_encoder.tokenizer, texts, CPU)

    def right(ends: Tensor) -> list[bool]:
        return [is_right(to_image(pipe.autoencoder.decode(end[None])), Claims()) for end in ends]

    torch.testing.assert_close(
        torch.stack(own_way(pupil, captions(kept.captions), kept.latents[:, 0], LEVELS), dim=1), kept.latents
    )
    assert right(kept.latents[:, -1]) == [True] * len(kept.captions)
    assert right(changed.latents[:, -1]) == [True] * len(changed.captions)
    levels = levels_of(CPU)
    for number in range(LEVELS):
        index = torch.full((len(changed.captions),), number)
        lesson = Lesson.of(teacher.transformer, captions(changed.captions), changed.latents[:, number], index, STAGE)
        after = changed.latents[:, number] + (levels[number + 1] - levels[number]) * lesson.target
        torch.testing.assert_close(after, changed.latents[:, number + 1], rtol=1e-4, atol=1e-4)


def test_noise_and_captions_are_new_in_each_round(through: Corrections) -> None:
    assert through.rounds > 1
    noise = torch.cat([through.changed.latents[:, 0], through.kept.latents[:, 0]]).flatten(1)
    assert torch.corrcoef(noise).fill_diagonal_(0.0).abs().max() < 0.1
    assert abs(noise.std().item() - 1.0) < 0.02
    assert len({*through.changed.captions, *through.kept.captions}) == len(noise)


def test_a_resumed_search_finds_what_one_that_went_through_does(
    found: Callable[..., Corrections], through: Corrections
) -> None:
    assert found("parts", 1).rounds < through.rounds
    with pytest.raises(RequestError, match="holds corrections already; go on with --resume"):
        found("parts", 3)
    parts = found("parts", 3, resume=True)
    assert (parts.rounds, parts.drawn, parts.wrong) == (through.rounds, through.drawn, through.wrong)
    assert parts.changed.captions == through.changed.captions
    assert torch.equal(parts.changed.latents, through.changed.latents)
    assert torch.equal(parts.kept.latents, through.kept.latents)


def test_a_student_that_is_never_right_has_nothing_to_keep(
    found: Callable[..., Corrections], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter([False, False, True, True])
    monkeypatch.setattr(gathering.judge, "agrees", lambda *_: next(verdicts))
    never = found("never", 2)
    assert (len(never.changed.captions), never.kept.captions, never.drawn) == (2, [], 2)
