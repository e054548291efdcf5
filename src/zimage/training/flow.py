"""The main stage: text encoder and transformer learn the flow from noise to the latents of scenes.

A step is a function of its number and the weights: scenes, captions, noise and noise levels are drawn from generators
of that step alone. Knows nothing of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.transformer import PATCH, TOKEN_MULTIPLE
from ..pipeline import ZImagePipeline
from .alignment import patch_facts
from .config import FlowStage, ModelSize
from .latents import caption_of, load_latents, scene_of
from .loop import Losses, run
from .models import Painter, compile_blocks, half_precision
from .state import TrainingState, step_generator
from .tokenizer import batch_of, load_tokenizer, tokens_of
from .world import CANVASES, Scene

SQUARE = 2
"""Every so many steps the pictures are square, in the others of one of the other sizes in turn."""


@dataclass(frozen=True)
class Batch:
    """What a step sees: scenes, their latents (B, 16, h, w), captions as ids (B, padded) with their lengths, noise and
    its levels.
    """

    scenes: list[Scene]
    latents: Tensor
    ids: Tensor
    lengths: list[int]
    noise: Tensor
    sigmas: Tensor

    def first(self, count: int) -> Batch:
        """The first `count` of them."""
        return Batch(*(getattr(self, field.name)[:count] for field in fields(self)))


def train_flow(
    stage: FlowStage,
    size: ModelSize,
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
    """Train on the tokenizer and the latents in `data`, from the weights of the checkpoint `initial` if it is given.

    See `loop.run` for errors.
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    painter = Painter(size)
    if initial is not None and not resume:
        painter.take(ZImagePipeline.from_pretrained(initial, dtype="float32", device="cpu"))
    painter.to(device)
    batches = Batches(stage, load_tokenizer(data / "tokenizer"), load_latents(data, seed), seed)
    if compiled:
        compile_blocks(painter.transformer, painter.text_encoder)
    state = TrainingState.start(painter, stage)

    def losses(step: int) -> Losses:
        return flow_losses(painter, batches.of(step), stage, device)

    run(state, losses, stage, folder=folder, seed=seed, resume=resume, until=until, progress=progress)


def flow_losses(painter: Painter, batch: Batch, stage: FlowStage, device: torch.device) -> Losses:
    """Mean squares of the errors of the velocity, over all levels and over the noisier ones, and of what is read."""
    sigmas = batch.sigmas.to(device)[:, None, None, None]
    latents, noise = batch.latents.to(device), batch.noise.to(device)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    with half_precision(device):
        times = 1.0 - batch.sigmas.to(device)
        velocity, read = painter.velocity_and_facts(noisy, batch.ids.to(device), batch.lengths, times)
    errors = (velocity - (noise - latents)).square().mean(dim=(1, 2, 3))  # (B,)
    noisier = (batch.sigmas.to(device) > 0.75).float()
    height, width = latents.shape[2:]
    facts = patch_facts(batch.scenes, height // PATCH, width // PATCH).to(device)
    alignment = (read - facts).square().mean()
    return {
        "loss": errors.mean() + stage.alignment * alignment,
        "velocity": errors.mean(),
        "noisier": (errors * noisier).sum() / noisier.sum().clamp(min=1.0),
        "alignment": alignment,
    }


class Batches:
    """What each step of the stage `purpose` sees, by its number."""

    def __init__(
        self, stage: FlowStage, tokenizer: Any, latents: list[Tensor], seed: int, purpose: str = "flow"
    ) -> None:
        self.stage, self.tokenizer, self.latents, self.seed, self.purpose = stage, tokenizer, latents, seed, purpose

    def of(self, step: int) -> Batch:
        """The batch of step 0, 1, …"""
        generator = step_generator(self.seed, step, self.purpose)
        canvas = 0 if step % SQUARE == 0 else 1 + step // SQUARE % (len(CANVASES) - 1)
        stored = self.latents[canvas]
        numbers = torch.randint(len(stored), (self.stage.batch,), generator=generator)
        latents = stored[numbers].float()
        scenes = [scene_of(self.seed, canvas, number) for number in numbers.tolist()]
        ids, lengths = batch_of(self._captions(step, scenes))
        noise = torch.randn(latents.shape, generator=generator)
        return Batch(scenes, latents, ids, lengths, noise, draw_sigmas(self.stage, self.stage.batch, generator))

    def _captions(self, step: int, scenes: list[Scene]) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, step, *self.purpose.encode()])
        is_long = step % self.stage.long_every == 0
        return [self._caption(scene, rng, is_long) for scene in scenes]

    def _caption(self, scene: Scene, rng: np.random.Generator, is_long: bool) -> list[int]:
        if rng.random() < self.stage.dropout:
            return tokens_of(self.tokenizer, [""])[0]
        text = caption_of(scene, rng)
        ids = tokens_of(self.tokenizer, [text])[0]
        while is_long and len(ids) <= TOKEN_MULTIPLE:
            text = f"{text}. {caption_of(scene, rng)}"
            ids = tokens_of(self.tokenizer, [text])[0]
        return ids


def draw_sigmas(stage: FlowStage, count: int, generator: torch.Generator) -> Tensor:
    """Noise levels (count,) in (0, 1) as `FlowStage` describes them."""
    levels = torch.sigmoid(torch.randn(count, generator=generator))
    levels = stage.shift * levels / (1.0 + (stage.shift - 1.0) * levels)
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < stage.uniform, uniform, levels)
