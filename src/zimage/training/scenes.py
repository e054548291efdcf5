"""Draws scenes, and examples to train with: a picture, its caption and what the caption claims.

`example` is a stream without state: the same seed and index give the same example, whatever was drawn before. Knows
nothing of models, nor of how a picture is read again (`judge`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations, permutations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from .captions import describe, draw_language
from .world import (
    BACKGROUNDS,
    CANVASES,
    COLOURS,
    CONTAINERS,
    CONTENTS,
    EXTENTS,
    SHAPES,
    SIZES,
    Claims,
    Scene,
    SceneObject,
    is_held_out_pair,
    is_held_out_single,
)

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

PALETTE = {
    "red": (215, 25, 30),
    "orange": (250, 130, 10),
    "yellow": (250, 220, 20),
    "green": (20, 150, 50),
    "cyan": (40, 200, 220),
    "blue": (30, 60, 210),
    "purple": (130, 40, 170),
    "pink": (250, 140, 200),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "black": (0, 0, 0),
}
COUNT_SHARES = (0.45, 0.45, 0.10)
"""Of scenes with one object, two and three."""
SHAPE_WEIGHTS = {"star": 2.0}
"""How often a shape is drawn, against 1 of the others: a small star is learned last, of all that is named here."""
INSIDE_SHARE = 0.35
"""Of the scenes with two objects."""
SEVERAL_LARGE = (0.40, 0.46)
"""Extent of a large object that shares the picture with others beside it."""
CONTAINER = (0.66, 0.68)
CONTENT = (0.22, 0.23)

MARGIN, GAP = 0.03, 0.07
"""Least distance from the picture's edge and between bounding boxes, over √(width · height)."""
DOMINANCE = 1.7
"""Something is left of another only where it is so many times farther to the left than up or down."""
MAX_ROTATION = 12.0
STAR_INNER = 0.46
RING_HOLE = 0.58
SUPERSAMPLING = 4


@dataclass(frozen=True, kw_only=True)
class Example:
    """What a model is trained with."""

    image: Pixels
    """(height, width, 3)"""
    caption: str
    claims: Claims
    scene: Scene
    language: str


def example(
    seed: int,
    index: int,
    *,
    canvas: tuple[int, int] = CANVASES[0],
    language: str | None = None,
    objects: int | None = None,
) -> Example:
    """Number `index` of the endless stream `seed`; what is not given is drawn.

    `canvas` is width and height in pixels, `language` "en" or "zh", `objects` how many there are, 1 to 3.
    """
    rng = np.random.default_rng([seed, index])
    scene = draw_scene(rng, objects=objects, canvas=canvas)
    language = language or draw_language(rng)
    caption, claims = describe(scene, rng, language)
    return Example(image=render(scene), caption=caption, claims=claims, scene=scene, language=language)


def draw_scene(rng: np.random.Generator, *, objects: int | None = None, canvas: tuple[int, int] = CANVASES[0]) -> Scene:
    """A scene with that many objects, else one to three; never in a combination that is held out for evaluation."""
    count = 1 + int(rng.choice(3, p=COUNT_SHARES)) if objects is None else objects
    if not 1 <= count <= 3:
        raise ValueError(f"objects must be 1, 2 or 3, got {objects}")
    while True:
        background = str(rng.choice(BACKGROUNDS))
        colours = [str(colour) for colour in rng.choice(COLOURS, count, replace=False)]
        inside = count == 2 and rng.random() < INSIDE_SHARE
        placed = _one_inside(colours, canvas, rng) if inside else _side_by_side(colours, canvas, rng)
        if placed is None:
            continue
        relations = ((0, "inside", 1),) if inside else _clear_relations(placed, canvas)
        width, height = canvas
        scene = Scene(width=width, height=height, background=background, objects=tuple(placed), relations=relations)
        if not _is_held_out(scene):
            return scene


def render(scene: Scene) -> Pixels:
    """The picture (height, width, 3), antialiased."""
    factor = SUPERSAMPLING
    image = Image.new("RGB", (scene.width * factor, scene.height * factor), PALETTE[scene.background])
    pen = ImageDraw.Draw(image)
    unit = factor * math.sqrt(scene.width * scene.height)
    for drawn in sorted(scene.objects, key=lambda drawn: -drawn.extent):  # what is inside comes last
        centre = np.array([drawn.x * scene.width, drawn.y * scene.height]) * factor
        points = outline(drawn.shape, drawn.rotation) * drawn.extent * unit
        pen.polygon((points + centre).ravel().tolist(), fill=PALETTE[drawn.colour])
        if drawn.shape == "ring":
            pen.polygon((points * RING_HOLE + centre).ravel().tolist(), fill=PALETTE[scene.background])
    return np.asarray(image.reduce(factor))


def outline(shape: str, rotation: float = 0.0) -> Floats:
    """Corners (n, 2) of the shape turned clockwise; its bounding box is centred at 0 and 1 on its longer side."""
    corners = {"square": 4, "triangle": 3, "star": 10}.get(shape, 96)
    first = math.pi / 4 if shape == "square" else math.pi / 2  # a side below, or a corner on top
    angles = np.arange(corners) * (2 * math.pi / corners) - first + math.radians(rotation)
    radii = np.where(np.arange(corners) % 2, STAR_INNER, 1.0) if shape == "star" else np.ones(corners)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
    low, high = points.min(axis=0), points.max(axis=0)
    centred: Floats = (points - (low + high) / 2) / (high - low).max()
    return centred


def _side_by_side(colours: list[str], canvas: tuple[int, int], rng: np.random.Generator) -> list[SceneObject] | None:
    """Objects apart from each other wherever they fit, or None if such as were drawn do not; two in clear relation."""
    several = len(colours) > 1
    objects = []
    for colour in colours:
        size = str(rng.choice(SIZES))
        limits = SEVERAL_LARGE if several and size == "large" else EXTENTS[size]
        objects.append(_unplaced(_shape(SHAPES, rng), colour, size, limits, rng))
    boxes = [_box(placed) for placed in objects]
    room, half = _room(canvas), np.array(boxes) / 2
    tries = rng.uniform(MARGIN + half, room - MARGIN - half, (200, len(objects), 2))
    fits = np.ones(len(tries), dtype=bool)
    for one, other in combinations(range(len(objects)), 2):
        apart, dominant = _apart(tries[:, one] - tries[:, other], half[one] + half[other])
        fits &= ((apart & dominant) if len(objects) == 2 else apart).any(axis=1)
    if not fits.any():
        return None
    return [_placed(what, where / room) for what, where in zip(objects, tries[int(fits.argmax())], strict=True)]


def _one_inside(colours: list[str], canvas: tuple[int, int], rng: np.random.Generator) -> list[SceneObject]:
    """A small object in the middle of a large one."""
    content = _unplaced(_shape(CONTENTS, rng), colours[0], "small", CONTENT, rng)
    container = _unplaced(_shape(CONTAINERS, rng), colours[1], "large", CONTAINER, rng)
    room, half = _room(canvas), _box(container) / 2
    where = rng.uniform(MARGIN + half, room - MARGIN - half)
    return [_placed(content, (where + _middle(container) - _middle(content)) / room), _placed(container, where / room)]


def _shape(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    """One of the shapes, as often as `SHAPE_WEIGHTS` has it."""
    weights = np.array([SHAPE_WEIGHTS.get(shape, 1.0) for shape in choices])
    return str(rng.choice(choices, p=weights / weights.sum()))


def _unplaced(shape: str, colour: str, size: str, limits: tuple[float, float], rng: np.random.Generator) -> SceneObject:
    extent = float(rng.uniform(*limits))
    rotation = 0.0 if shape in ("circle", "ring") else float(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    return SceneObject(shape=shape, colour=colour, size=size, extent=extent, x=0.5, y=0.5, rotation=rotation)


def _placed(what: SceneObject, where: Floats) -> SceneObject:
    return replace(what, x=float(where[0]), y=float(where[1]))


def _box(what: SceneObject) -> Floats:
    """Width and height of the bounding box over √(width · height) of the picture."""
    sides: Floats = np.ptp(outline(what.shape, what.rotation), axis=0) * what.extent
    return sides


def _middle(what: SceneObject) -> Floats:
    """Where its centre of area is from that of its bounding box: lower, in a triangle."""
    offset: Floats = outline(what.shape, what.rotation).mean(axis=0) * what.extent
    return offset


def _room(canvas: tuple[int, int]) -> Floats:
    """The picture's width and height in the unit of extents."""
    room: Floats = np.array(canvas) / math.sqrt(canvas[0] * canvas[1])
    return room


def _apart(distance: Floats, touching: Floats) -> tuple[Bools, Bools]:
    """For both axes: are the boxes apart along it, and are their centres much farther apart along it than across."""
    along = np.abs(distance)
    return along - touching >= GAP, along >= DOMINANCE * along[..., ::-1]


def _clear_relations(objects: list[SceneObject], canvas: tuple[int, int]) -> tuple[tuple[int, str, int], ...]:
    """Which objects are clearly left of or above which."""
    found = []
    for one, other in permutations(range(len(objects)), 2):
        first, second = objects[one], objects[other]
        distance = np.array([second.x - first.x, second.y - first.y]) * _room(canvas)
        apart, dominant = _apart(distance, (_box(first) + _box(second)) / 2)
        for axis, relation in enumerate(("left of", "above")):
            if apart[axis] and dominant[axis] and distance[axis] > 0:
                found.append((one, relation, other))
    return tuple(found)


def _is_held_out(scene: Scene) -> bool:
    if len(scene.objects) == 1:
        (only,) = scene.objects
        return is_held_out_single(only.shape, only.colour, only.size, scene.background)
    names = [(drawn.shape, drawn.colour) for drawn in scene.objects]
    return any(is_held_out_pair(names[one], relation, names[other]) for one, relation, other in scene.relations)
