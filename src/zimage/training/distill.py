"""The last stage: a transformer learns to draw in eight evaluations without guidance as its teacher does in many.

Progressive distillation in one go (arXiv 2202.00512) of a guided teacher (arXiv 2210.03142): from one of the student's
eight levels the teacher takes several guided steps of Euler to the next, and the student learns the velocity whose
single step ends there. Lessons begin at a scene's latents with noise or, in a share of the steps, where the student
itself gets to from noise, so that it learns to mend what it does wrong. The text encoder stays as it is.

A student is corrected on ways that were gathered (`corrections`): its own way from the same noise, all steps at once,
learns to go where the teacher's way went, or where its own went before.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipeline import ZImagePipeline
from ..sampling.guidance import guide
from ..sampling.schedule import shifted_sigmas
from ..variants import TURBO
from .config import DistillationStage
from .corrections import LEVELS, Corrections, load_corrections
from .flow import Batches
from .latents import load_latents
from .loop import Losses, run
from .models import Painter, compile_blocks, half_precision, predict
from .state import TrainingState, fill, step_generator
from .tokenizer import batch_of, load_tokenizer, tokens_of


def train_turbo(
    stage: DistillationStage,
    painter: Painter,
    folder: Path,
    *,
    data: Path,
    initial: str | None = None,
    seed: int = 0,
    resume: bool = False,
    until: int | None = None,
    progress: bool = True,
    compiled: bool = False,
) -> None:
    """Distil the teacher `painter` on the tokenizer and the latents in `data`.

    The student starts as its teacher, or from the weights of the checkpoint `initial`, an earlier student of it.
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    painter.to(device).requires_grad_(False)
    student = copy.deepcopy(painter.transformer).requires_grad_(True)
    if initial is not None and not resume:
        earlier = ZImagePipeline.from_pretrained(initial, dtype="float32", device="cpu")
        fill(student, earlier.transformer.state_dict(), "the student to start from")
    tokenizer = load_tokenizer(data / "tokenizer")
    batches = Batches(stage, tokenizer, load_latents(data, seed), seed, "turbo")
    corrections = load_corrections(data, seed) if stage.correction_share else None
    lessons = Lessons(painter, student, batches, device, corrections)
    if compiled:
        compile_blocks(painter.transformer, painter.text_encoder)
        compile_blocks(student)
    state = TrainingState.start(student, stage)

    def losses(step: int) -> Losses:
        return lessons.losses(step)

    run(state, losses, stage, folder=folder, seed=seed, resume=resume, until=until, progress=progress)


@dataclass(frozen=True)
class Captions:
    """Features (B, padded, hidden) of captions and (1, padded, hidden) of the empty one, with their lengths."""

    features: Tensor
    lengths: list[int]
    empty: Tensor
    empty_length: int

    @classmethod
    def of_texts(cls, painter: Painter, tokenizer: Any, texts: list[str], device: torch.device) -> Captions:
        """Those of `texts`."""
        ids, lengths = batch_of(tokens_of(tokenizer, texts))
        return cls.of(painter, ids, lengths, batch_of(tokens_of(tokenizer, [""])), device)

    @classmethod
    @torch.no_grad()
    def of(
        cls, painter: Painter, ids: Tensor, lengths: list[int], empty: tuple[Tensor, list[int]], device: torch.device
    ) -> Captions:
        """Those with ids (B, padded); `empty` are ids and lengths of the empty caption alone."""
        count, padded = ids.shape
        nothing = empty[0].new_zeros(1, padded)
        nothing[:, : empty[0].shape[1]] = empty[0]
        with half_precision(device):
            both = torch.cat([ids, nothing]).to(device)
            encoded = painter.text_encoder(input_ids=both, use_cache=False).last_hidden_state
        return cls(encoded[:count], lengths, encoded[count:], empty[1][0])

    def with_empty(self) -> Captions:
        """All of them, and the empty one as often again."""
        empties = [self.empty_length] * len(self.lengths)
        features = torch.cat([self.features, self.empty.expand_as(self.features)])
        return replace(self, features=features, lengths=[*self.lengths, *empties])

    def repeat(self, times: int) -> Captions:
        """All of them `times` times."""
        return replace(self, features=self.features.repeat(times, 1, 1), lengths=self.lengths * times)


@dataclass(frozen=True)
class Lesson:
    """Where the student stands, for which captions, and the velocity (B, 16, h, w) that it should have there."""

    noisy: Tensor
    sigmas: Tensor
    captions: Captions
    target: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: Any, captions: Captions, noisy: Tensor, index: Tensor, stage: DistillationStage) -> Lesson:
        """What the teacher does from `noisy` at level `index` (B,) of the student's schedule to the next."""
        levels = levels_of(noisy.device)
        start, end = levels[index], levels[index + 1]
        both_captions, latents = captions.with_empty(), noisy
        for step in range(stage.teacher_steps):
            sigmas = torch.lerp(start, end, step / stage.teacher_steps)
            both = _velocity(teacher, both_captions, latents.repeat(2, 1, 1, 1), sigmas.repeat(2))
            positive, negative = both.chunk(2)
            velocity = guide(positive, negative, stage.guidance_scale)
            latents = latents + ((end - start) / stage.teacher_steps)[:, None, None, None] * velocity
        target = (latents - noisy) / (end - start)[:, None, None, None]
        return cls(noisy, start, captions, target)


def lesson_loss(student: Any, lesson: Lesson) -> Tensor:
    """The mean square of the velocity's error."""
    velocity = _velocity(student, lesson.captions, lesson.noisy, lesson.sigmas)
    return (velocity - lesson.target).square().mean()


def way_loss(student: Any, captions: Captions, ways: Tensor) -> Tensor:
    """The mean square of how far the student gets from `ways` (B, levels + 1, 16, h, w), over all levels."""
    own = own_way(student, captions, ways[:, 0], LEVELS)
    return (torch.stack(own, dim=1) - ways)[:, 1:].square().mean()


class Lessons:
    """The lesson of each step, by its number and the student's weights."""

    def __init__(
        self,
        painter: Painter,
        student: Any,
        batches: Batches,
        device: torch.device,
        corrections: Corrections | None = None,
    ) -> None:
        self.painter, self.student, self.batches, self.device = painter, student, batches, device
        self.corrections = corrections
        self.empty = batch_of(tokens_of(batches.tokenizer, [""]))
        assert isinstance(batches.stage, DistillationStage)
        self.stage = batches.stage

    def losses(self, step: int) -> Losses:
        """What the student does wrong in step 0, 1, …: in its lesson, or on a batch of corrections."""
        generator = step_generator(self.batches.seed, step, "corrections")
        if self.corrections is None or torch.rand((), generator=generator) >= self.stage.correction_share:
            return {"loss": lesson_loss(self.student, self.of(step))}
        texts, ways = [], []
        for one in filter(lambda one: one.captions, (self.corrections.changed, self.corrections.kept)):
            numbers = torch.randint(len(one.captions), (self.stage.corrected,), generator=generator)
            chosen = one[numbers.tolist()]
            texts += chosen.captions
            ways.append(chosen.latents)
        captions = Captions.of_texts(self.painter, self.batches.tokenizer, texts, self.device)
        return {"loss": way_loss(self.student, captions, torch.cat(ways).to(self.device))}

    @torch.no_grad()
    def of(self, step: int) -> Lesson:
        """The lesson of step 0, 1, …"""
        batch, stage = self.batches.of(step), self.stage
        generator = step_generator(self.batches.seed, step, "levels")
        if torch.rand((), generator=generator) < stage.own_share:
            batch = batch.first(max(1, stage.batch // LEVELS))
            captions = Captions.of(self.painter, batch.ids, batch.lengths, self.empty, self.device)
            index = torch.arange(LEVELS).repeat_interleave(len(batch.noise))
            noisy = torch.cat(own_way(self.student, captions, batch.noise.to(self.device)))
            captions = captions.repeat(LEVELS)
        else:
            captions = Captions.of(self.painter, batch.ids, batch.lengths, self.empty, self.device)
            index = torch.randint(LEVELS, (len(batch.noise),), generator=generator)
            sigmas = levels_of(torch.device("cpu"))[index, None, None, None]
            noisy = torch.lerp(batch.latents, batch.noise, sigmas).to(self.device)
        return Lesson.of(self.painter.transformer, captions, noisy, index, stage)


def own_way(student: Any, captions: Captions, noise: Tensor, steps: int = LEVELS - 1) -> list[Tensor]:
    """Where the student is before each of its first `steps` steps from `noise` (B, 16, h, w), and after the last."""
    passed = [noise]
    for start, end in pairwise(levels_of(noise.device)[: steps + 1]):
        velocity = _velocity(student, captions, passed[-1], start.expand(len(noise)))
        passed.append(passed[-1] + (end - start) * velocity)
    return passed


def _velocity(transformer: Any, captions: Captions, noisy: Tensor, sigmas: Tensor) -> Tensor:
    with half_precision(noisy.device):
        return predict(transformer, captions.features, captions.lengths, noisy, 1.0 - sigmas)


def levels_of(device: torch.device) -> Tensor:
    """The student's noise levels, of which the last is 0."""
    return shifted_sigmas(LEVELS, TURBO.shift).to(device)
