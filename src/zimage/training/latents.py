"""The latents of many scenes, encoded once and kept in a file, so that a training step need not draw or encode.

Scenes are numbers of a stream: what a caption can say of one is drawn again from its number. Knows no training.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ..errors import CheckpointError
from ..files.atomic import write_atomically
from .autoencoder import pixels_of
from .captions import describe
from .models import half_precision
from .scenes import draw_scene, render
from .world import CANVASES, Scene

LATENTS = "latents.safetensors"
_BATCH = 64


def counts(scenes: int) -> tuple[int, ...]:
    """How many of the scenes have each size: half are square."""
    others = scenes // (2 * (len(CANVASES) - 1))
    return (scenes - others * (len(CANVASES) - 1), *([others] * (len(CANVASES) - 1)))


@lru_cache(maxsize=2**16)
def scene_of(seed: int, canvas: int, index: int) -> Scene:
    """Scene number `index` of those of the size `CANVASES[canvas]`; kept, since training comes back to each."""
    return draw_scene(np.random.default_rng([seed, canvas, index]), canvas=CANVASES[canvas])


def caption_of(scene: Scene, rng: np.random.Generator) -> str:
    """Something true about the scene, drawn anew."""
    return describe(scene, rng)[0]


@torch.no_grad()
def store_latents(vae: Any, folder: Path, scenes: int, *, seed: int, progress: bool = True) -> None:
    """Encode `scenes` scenes and write their scaled latents (scenes, 16, h, w) of each size to `folder`."""
    config, tensors = vae.config, {}
    with tqdm(total=scenes, unit="scene", disable=not progress) as bar:
        for canvas, count in enumerate(counts(scenes)):
            parts = []
            for start in range(0, count, _BATCH):
                numbers = range(start, min(start + _BATCH, count))
                pixels = pixels_of([render(scene_of(seed, canvas, number)) for number in numbers])
                with half_precision(pixels.device):
                    mean = vae.encoder(pixels).float().chunk(2, dim=1)[0]
                scaled = (mean - config.shift_factor) * config.scaling_factor
                parts.append(scaled.to(torch.bfloat16).contiguous())
                bar.update(len(numbers))
            tensors[str(canvas)] = torch.cat(parts)
    folder.mkdir(parents=True, exist_ok=True)
    written = save(tensors, metadata={"seed": str(seed)})
    write_atomically(folder / LATENTS, lambda file: file.write(written), overwrite=True)


def load_latents(folder: Path, seed: int) -> list[Tensor]:
    """The stored latents of each size; `CheckpointError` if there are none, or those of another seed."""
    path = folder / LATENTS
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; run the stage `latents` first")
    with safe_open(path, framework="pt") as file:
        if file.metadata()["seed"] != str(seed):
            raise CheckpointError(f"{path} has the scenes of seed {file.metadata()['seed']}, this run's is {seed}")
        return [file.get_tensor(str(canvas)) for canvas in range(len(CANVASES))]
