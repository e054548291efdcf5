"""What the student draws wrong and its teacher right, and what the student is to keep: ways from noise to picture.

`gathering` finds them and `distill` learns from them; here is what they are and their file. Knows no model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import CheckpointError
from ..files.atomic import write_atomically
from ..variants import TURBO
from .config import LATENT_CHANNELS, LATENT_SCALE
from .world import CANVASES

CORRECTIONS = "corrections.safetensors"
LEVELS = TURBO.num_inference_steps
"""Noise levels that the student evaluates at."""


@dataclass(frozen=True)
class Ways:
    """Captions, and latents (captions, levels + 1, 16, h, w) at the student's levels from noise to picture."""

    captions: list[str]
    latents: Tensor

    @classmethod
    def none(cls) -> Ways:
        """Those of no caption."""
        width, height = (side // LATENT_SCALE for side in CANVASES[0])
        return cls([], torch.empty(0, LEVELS + 1, LATENT_CHANNELS, height, width))

    def __add__(self, other: Ways) -> Ways:
        return Ways(self.captions + other.captions, torch.cat([self.latents, other.latents]))

    def __getitem__(self, numbers: list[int]) -> Ways:
        return Ways([self.captions[number] for number in numbers], self.latents[numbers])


@dataclass(frozen=True)
class Corrections:
    """What the student is to change and what it is to keep, and how far the search for it has come."""

    changed: Ways
    """The teacher's, right where the student's picture from that noise is wrong."""
    kept: Ways
    """The student's own, to pictures that are right; as many, unless a round has fewer."""
    rounds: int = 0
    drawn: int = 0
    wrong: int = 0
    """Pictures by the student, and the wrong ones that the teacher tried."""

    def save(self, folder: Path, seed: int) -> None:
        """Write them into `folder`, as a whole or not at all."""
        described = {name: str(getattr(self, name)) for name in COUNTS} | {"seed": str(seed)}
        described |= {name: json.dumps(getattr(self, name).captions) for name in KINDS}
        written = save({name: getattr(self, name).latents.contiguous() for name in KINDS}, metadata=described)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CORRECTIONS, lambda file: file.write(written), overwrite=True)


KINDS, COUNTS = ("changed", "kept"), ("rounds", "drawn", "wrong")


def load_corrections(folder: Path, seed: int) -> Corrections:
    """Those in `folder`; `CheckpointError` if there are none, or those of another seed."""
    path = folder / CORRECTIONS
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; run the stage `gather` first")
    with safe_open(path, framework="pt") as file:
        described = file.metadata()
        if described["seed"] != str(seed):
            raise CheckpointError(f"{path} was gathered with seed {described['seed']}, this run's is {seed}")
        changed, kept = (Ways(json.loads(described[name]), file.get_tensor(name)) for name in KINDS)
        return Corrections(changed, kept, *(int(described[name]) for name in COUNTS))
