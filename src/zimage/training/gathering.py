"""Finds what the student draws wrong and its teacher draws right, from the same noise and as the judge reads it.

Captions are of training scenes, never of combinations held out. Knows how ways from noise to a picture are made, not
how they are learned.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import RequestError
from ..models.autoencoder import to_image
from ..pipeline import ZImagePipeline
from . import judge
from .captions import describe
from .config import LATENT_CHANNELS, DistillationStage
from .corrections import CORRECTIONS, LEVELS, Corrections, Ways, load_corrections
from .distill import Captions, Lesson, levels_of, own_way
from .models import Painter, compile_blocks
from .scenes import draw_scene
from .state import fill, step_generator
from .world import Claims

OBJECTS = (1, 2)
"""In the scenes of captions, in turn: of three the teacher itself seldom draws all."""
ROUND = 32
"""Wrong pictures by the student that the teacher tries to draw at once."""


def gather(
    stage: DistillationStage,
    painter: Painter,
    student: str,
    folder: Path,
    *,
    count: int,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
    compiled: bool = False,
) -> None:
    """Gather `count` corrections, or a few more, of the checkpoint `student` by the teacher `painter`, into `folder`.

    A round draws until the student has been wrong in `ROUND` pictures, and is a function of its number and the seed;
    `resume` goes on after the last one that was saved. Raises `RequestError` if the folder holds some already.
    """
    if not resume and (folder / CORRECTIONS).exists():
        raise RequestError(f"{folder} holds corrections already; go on with --resume, or choose another folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = ZImagePipeline.from_pretrained(student, dtype="float32", device="cpu")
    painter.to(device).requires_grad_(False)
    pupil = copy.deepcopy(painter.transformer)
    fill(pupil, pipe.transformer.state_dict(), "the student to correct")
    if compiled:
        compile_blocks(painter.transformer, painter.text_encoder)
        compile_blocks(pupil)
    search = Search(stage, painter, pupil, pipe, seed, device)
    found = load_corrections(folder, seed) if resume else Corrections(Ways.none(), Ways.none())
    with tqdm(total=count, initial=len(found.changed.captions), unit="correction", disable=not progress) as bar:
        while len(found.changed.captions) < count:
            found = search.after(found)
            found.save(folder, seed)
            bar.update(len(found.changed.captions) - bar.n)
            bar.set_postfix(wrong=f"{found.wrong}/{found.drawn}", right=f"{len(found.changed.captions)}/{found.wrong}")


@dataclass(frozen=True)
class Search:
    """What a round needs: the teacher, the student's transformer, and the pipeline that has the rest of its models."""

    stage: DistillationStage
    painter: Painter
    pupil: Any
    pipe: ZImagePipeline
    seed: int
    device: torch.device

    @torch.no_grad()
    def after(self, found: Corrections) -> Corrections:
        """What was found and what the next round finds."""
        mistakes: list[Claims] = []
        wrong, right, drawn = Ways.none(), Ways.none(), 0
        while len(mistakes) < ROUND:
            claims, own = self._drawn(found.rounds, drawn)
            are_right = [self._is_right(way[-1], one) for way, one in zip(own.latents, claims, strict=True)]
            missed = [number for number, is_right in enumerate(are_right) if not is_right][: ROUND - len(mistakes)]
            mistakes += [claims[number] for number in missed]
            wrong += own[missed]
            right += own[[number for number, is_right in enumerate(are_right) if is_right]]
            drawn += ROUND
        taught = self._taught(wrong)
        agreed = [n for n, one in enumerate(mistakes) if self._is_right(taught.latents[n, -1], one)]
        kept = right[list(range(len(right.captions)))[: len(agreed)]]
        counts = found.rounds + 1, found.drawn + drawn, found.wrong + ROUND
        return Corrections(found.changed + taught[agreed], found.kept + kept, *counts)

    def _drawn(self, number: int, start: int) -> tuple[list[Claims], Ways]:
        """What the student draws for the captions of a round from number `start` on, and their claims."""
        texts, claims, noise = [], [], []
        height, width = Ways.none().latents.shape[-2:]
        for index in range(start, start + ROUND):
            rng = np.random.default_rng([self.seed, number, index, *b"corrections"])
            scene = draw_scene(rng, objects=OBJECTS[index % len(OBJECTS)])
            text, claimed = describe(scene, rng)
            while not claimed.exact:  # of bare words nearly every picture is right
                text, claimed = describe(scene, rng)
            generator = step_generator(self.seed, index, f"corrections/{number}")
            noise.append(torch.randn(LATENT_CHANNELS, height, width, generator=generator))
            texts.append(text)
            claims.append(claimed)
        own = own_way(self.pupil, self._captions(texts), torch.stack(noise).to(self.device), LEVELS)
        return claims, Ways(texts, torch.stack(own, dim=1).cpu())

    def _taught(self, wrong: Ways) -> Ways:
        """How the teacher goes from the same noise."""
        captions, passed = self._captions(wrong.captions), [wrong.latents[:, 0].to(self.device)]
        levels = levels_of(self.device)
        for number in range(LEVELS):
            index = torch.full((len(wrong.captions),), number)
            lesson = Lesson.of(self.painter.transformer, captions, passed[-1], index, self.stage)
            passed.append(passed[-1] + (levels[number + 1] - levels[number]) * lesson.target)
        return Ways(wrong.captions, torch.stack(passed, dim=1).cpu())

    def _captions(self, texts: list[str]) -> Captions:
        return Captions.of_texts(self.painter, self.pipe.text_encoder.tokenizer, texts, self.device)

    def _is_right(self, latents: Tensor, claims: Claims) -> bool:
        picture = to_image(self.pipe.autoencoder.decode(latents[None].cpu()))
        return judge.agrees(judge.read(picture), claims)
