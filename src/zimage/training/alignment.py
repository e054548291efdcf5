"""A middle layer of the transformer is told what each patch of the picture belongs to.

Representation alignment (arXiv 2410.06940) with the scene itself as the teacher: while the flow is learned, a small
head reads from the patches' features which object each of them is part of or nearest to, and where that object is. The
gradient of its error teaches shapes and words much sooner than the flow's own does. The head is not part of the model
that comes out. Knows nothing of latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .scenes import MAX_ROTATION
from .world import BACKGROUNDS, COLOURS, SHAPES, Scene

FEATURES = len(SHAPES) + len(COLOURS) + len(BACKGROUNDS) + 4
"""Shape, colour and background, one of each kind being 1; half the extent, rotation, and the way to the centre."""

Floats = npt.NDArray[np.float32]


class Reader(nn.Sequential):
    """The head: from features (..., dim) to what `patch_facts` gives."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.RMSNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, FEATURES))


def patch_facts(scenes: Sequence[Scene], rows: int, columns: int) -> Tensor:
    """Facts (B, rows · columns, FEATURES) about the patches of scenes of one size, row by row.

    A patch belongs to the smallest object whose square around the centre it has its own centre in, else to the object
    whose square is nearest. Lengths are in half of √(width · height).
    """
    width, height = scenes[0].width, scenes[0].height
    unit = math.sqrt(width * height) / 2
    down, across = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    patches = np.stack([across.ravel() * width, down.ravel() * height], axis=1) / unit  # (patches, 2)
    table, centres, halves = _objects(scenes, np.array([width, height]) / unit)
    ways = centres[:, None] - patches[None, :, None]  # (B, patches, objects, 2)
    beyond = np.abs(ways).max(axis=3) - halves[:, None]
    owner = np.where(beyond < 0, halves[:, None] - 1e3, beyond).argmin(axis=2)  # (B, patches)
    rows_of = np.arange(len(scenes))[:, None]
    way = np.take_along_axis(ways, owner[:, :, None, None], axis=2)[:, :, 0]
    return torch.from_numpy(np.concatenate([table[rows_of, owner], way], axis=2).astype(np.float32))


def _objects(scenes: Sequence[Scene], room: npt.NDArray[np.float64]) -> tuple[Floats, Floats, Floats]:
    """What is told of each object (B, most objects, FEATURES - 2), its centre and half of its extent."""
    most = max(len(scene.objects) for scene in scenes)
    table = np.zeros((len(scenes), most, FEATURES - 2), dtype=np.float32)
    centres = np.zeros((len(scenes), most, 2), dtype=np.float32)
    halves = np.full((len(scenes), most), -np.inf, dtype=np.float32)  # where there is no object: infinitely far
    for number, scene in enumerate(scenes):
        for place, drawn in enumerate(scene.objects):
            row = table[number, place]
            row[SHAPES.index(drawn.shape)] = 1.0
            row[len(SHAPES) + COLOURS.index(drawn.colour)] = 1.0
            row[len(SHAPES) + len(COLOURS) + BACKGROUNDS.index(scene.background)] = 1.0
            row[-2:] = drawn.extent, drawn.rotation / MAX_ROTATION
            centres[number, place] = drawn.x * room[0], drawn.y * room[1]
            halves[number, place] = drawn.extent
    return table, centres, halves
