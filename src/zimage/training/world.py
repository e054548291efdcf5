"""The world of drawn scenes: its words, what a scene is made of, and what a caption claims of one.

Plain data without numpy or torch. Knows neither how a scene is drawn (`scenes`), nor how it is worded (`captions`), nor
how a picture is read (`judge`); those three share what is here and nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "ring")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "grey", "black")
"""None of them has a hue, so that no background passes for an object's colour, however it is blurred."""
RELATIONS = ("left of", "above", "inside")
""""right of" and "below" are another wording of the first two with the objects exchanged."""

CONTAINERS = ("circle", "square", "triangle", "ring")
"""What another object can be inside of; a star's middle is too narrow."""
CONTENTS = ("circle", "square", "triangle", "star")
"""What can be inside: through the hole of a ring one would see its container."""

CANVASES = ((128, 128), (160, 96), (96, 160))
"""Width and height in pixels of the pictures, all of nearly the same area."""
EXTENTS = {"small": (0.22, 0.28), "large": (0.40, 0.68)}
"""What the words for sizes mean: the longer side of an object's bounding box over √(width · height) of the picture.

Nothing is drawn in the gap between them, so that any limit in it tells the two apart.
"""


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One flat object."""

    shape: str
    colour: str
    size: str
    extent: float
    """Longer side of its bounding box over √(width · height); within `EXTENTS[size]`."""
    x: float
    y: float
    """Centre of its bounding box over the picture's width and height, from the upper left corner."""
    rotation: float = 0.0
    """Degrees clockwise, a few; circles and rings have none."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One to three objects of different colours on a plain background."""

    width: int
    height: int
    background: str
    objects: tuple[SceneObject, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    """All that hold clearly: `(0, "left of", 1)` says that `objects[0]` is left of `objects[1]`."""


@dataclass(frozen=True, kw_only=True)
class ObjectClaim:
    """What a caption says of one object; None where it says nothing."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True, kw_only=True)
class Claims:
    """All that a caption says, and nothing else."""

    objects: tuple[ObjectClaim, ...] = ()
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None
    exact: bool = True
    """Whether there are as many objects as claimed. Not so for bare words ("red", "a black background"), which are true
    of a picture as soon as one object, or the background, is as they say."""


HELD_OUT_SHARE = 10
"""One combination in so many is never drawn as a training example."""


def is_held_out_single(shape: str, colour: str, size: str, background: str) -> bool:
    """Whether no training scene shows just this one object on this background."""
    return _is_held_out("single", shape, colour, size, background)


def is_held_out_pair(first: tuple[str, str], relation: str, second: tuple[str, str]) -> bool:
    """Whether no training scene, of two objects or three, shows these (shape, colour) in this relation."""
    return _is_held_out("pair", *first, relation, *second)


def _is_held_out(*words: str) -> bool:
    digest = hashlib.sha256(" ".join(words).encode()).digest()  # the same on every machine, unlike hash()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0
