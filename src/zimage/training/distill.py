"""The last stage: a transformer learns to draw in eight evaluations without guidance as its teacher does in many.

Progressive distillation in one go (arXiv 2202.00512) of a guided teacher (arXiv 2210.03142): from a scene's latents
with noise at one of the student's eight levels, the teacher takes several guided steps of Euler to the next level, and
the student learns the velocity whose single step ends there. The text encoder stays as it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipeline import ZImagePipeline
from ..sampling.guidance import guide
from ..sampling.schedule import shifted_sigmas
from ..variants import TURBO
from .config import DistillationStage
from .flow import Batch, Batches
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
    empty = batch_of(tokens_of(tokenizer, [""]))
    if compiled:
        compile_blocks(painter.transformer, painter.text_encoder)
        compile_blocks(student)
    state = TrainingState.start(student, stage)

    def losses(step: int) -> Losses:
        index = torch.randint(TURBO.num_inference_steps, (stage.batch,), generator=step_generator(seed, step, "levels"))
        lesson = Lesson.of(painter, batches.of(step), index, empty, stage, device)
        return {"loss": lesson_loss(student, lesson, device)}

    run(state, losses, stage, folder=folder, seed=seed, resume=resume, until=until, progress=progress)


@dataclass(frozen=True)
class Lesson:
    """Where the student stands, for which caption, and the velocity (B, 16, h, w) that it should have there."""

    noisy: Tensor
    sigmas: Tensor
    features: Tensor
    lengths: list[int]
    target: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        painter: Painter,
        batch: Batch,
        index: Tensor,
        empty: tuple[Tensor, list[int]],
        stage: DistillationStage,
        device: torch.device,
    ) -> Lesson:
        """What the teacher does from level `index` (B,) of the student's schedule to the next."""
        levels = shifted_sigmas(TURBO.num_inference_steps, TURBO.shift)
        start, end = levels[index].to(device), levels[index + 1].to(device)
        noisy = _mixed(batch.latents.to(device), batch.noise.to(device), start)
        count, padded = batch.ids.shape
        nothing = empty[0].new_zeros(1, padded)
        nothing[:, : empty[0].shape[1]] = empty[0]
        ids = torch.cat([batch.ids, nothing]).to(device)
        lengths = [*batch.lengths, *(empty[1] * count)]
        with half_precision(device):
            encoded = painter.text_encoder(input_ids=ids, use_cache=False).last_hidden_state
        features = torch.cat([encoded[:count], encoded[count:].expand(count, -1, -1)])
        latents = noisy
        for step in range(stage.teacher_steps):
            sigmas = torch.lerp(start, end, step / stage.teacher_steps)
            with half_precision(device):
                both = predict(
                    painter.transformer, features, lengths, latents.repeat(2, 1, 1, 1), 1.0 - sigmas.repeat(2)
                )
            positive, negative = both.chunk(2)
            velocity = guide(positive, negative, stage.guidance_scale)
            latents = latents + ((end - start) / stage.teacher_steps)[:, None, None, None] * velocity
        target = (latents - noisy) / (end - start)[:, None, None, None]
        return cls(noisy, start, features[:count], batch.lengths, target)


def lesson_loss(student: Any, lesson: Lesson, device: torch.device) -> Tensor:
    """The mean square of the velocity's error."""
    with half_precision(device):
        velocity = predict(student, lesson.features, lesson.lengths, lesson.noisy, 1.0 - lesson.sigmas)
    return (velocity - lesson.target).square().mean()


def _mixed(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    return torch.lerp(latents, noise, sigmas[:, None, None, None])
