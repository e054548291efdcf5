"""Reads a picture of the drawn world: what is in it, and whether that is what a caption claims.

By colour and geometry alone, with thresholds of its own: no network, nothing shared with what draws the pictures but
the vocabulary. It forgives what a small autoencoder and a diffusion model leave (soft edges, noise, specks, shades of a
colour), and names what it cannot recognise None, which satisfies no claim about it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from .world import COLOURS, Claims, ObjectClaim

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

HUE_LIMITS = (14, 41, 92, 161, 208, 255, 305, 343)
"""Degrees at which one colour of `COLOURS` ends and the next begins; red begins again at the last."""
BACKGROUND_VALUES = {"black": (0, 55), "grey": (85, 175), "white": (205, 255)}
MIN_CHROMA = 45
"""Difference between a pixel's largest and smallest channel, of 255, from which on it belongs to an object."""
SURE_CHROMA = 60
"""An object must have so much in its middle for its colour to have a name."""
UNLIKE_BACKGROUND = 60
"""A pixel without hue that differs so much from the background belongs to an object too, of no colour with a name."""
SPECK = 0.004
"""Share of the picture's area below which something is overlooked; a small star has four times as much."""
SIZE_RANGES = {"small": (0.13, 0.34), "large": (0.34, 0.80)}
"""Longer side of the bounding box over √(width · height)."""
RING_HOLE = (0.06, 0.6)
"""Share of a ring's filled area that background takes up in its hole."""

BACKGROUND, NAMELESS = 0, len(COLOURS) + 1
"""Labels of pixels; 1 to 8 are the colours in the order of `COLOURS`."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """An object in a picture; None is what could not be recognised."""

    shape: str | None
    colour: str | None
    size: str | None
    centre: tuple[float, float]
    """x, y in pixels, of the outline's area."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels; the last two are outside."""
    inside: int | None = None
    """Index of the object that surrounds it."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is in a picture, the largest object first."""

    background: str | None
    objects: tuple[Seen, ...]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A connected area of one label."""

    label: int
    mask: Bools
    area: int
    box: tuple[int, int, int, int]

    @property
    def middle(self) -> tuple[float, float]:
        rows, columns = np.nonzero(self.mask)
        return float(columns.mean()), float(rows.mean())


def read(image: npt.NDArray[np.uint8] | Image.Image) -> Reading:
    """What is in the picture, an RGB image or (height, width, 3) bytes."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    pixels = np.asarray(picture.convert("RGB").filter(ImageFilter.MedianFilter(3))).astype(np.int64)
    background, labels = _labels(pixels)
    pieces = _pieces(_without_rims(labels, pixels))
    objects = sorted((piece for piece in pieces if piece.label != BACKGROUND), key=lambda piece: -piece.area)
    holes = [piece for piece in pieces if piece.label == BACKGROUND and not _touches_edge(piece)]
    return Reading(background=background, objects=tuple(_seen(piece, objects, holes, pixels) for piece in objects))


def agrees(reading: Reading, claims: Claims) -> bool:
    """Whether the picture is as claimed; see `mistakes`."""
    return not mistakes(reading, claims)


def mistakes(reading: Reading, claims: Claims) -> list[str]:
    """What is wrong with a picture of which this is claimed, in words; empty if nothing is.

    Each claimed object is matched with one in the picture such that the fewest mistakes remain. All that is said of it,
    every relation and the background must hold, and there must be no other object; for claims that are not `exact` it
    is enough that all they name is there.
    """
    found = []
    if claims.background not in (None, reading.background):
        found.append(f"the background is {reading.background}, not {claims.background}")
    wanted, seen = len(claims.objects), reading.objects
    if len(seen) < wanted or (claims.exact and len(seen) != wanted):
        return [*found, f"{len(seen)} objects are seen, not {wanted}"]
    return found + min((list(_differences(claims, chosen, seen)) for chosen in _choices(seen, wanted)), key=len)


def _choices(seen: tuple[Seen, ...], wanted: int) -> Iterator[tuple[int, ...]]:
    return permutations(range(min(len(seen), 8)), wanted)  # a picture of more objects is a failed one anyway


def _differences(claims: Claims, chosen: tuple[int, ...], seen: tuple[Seen, ...]) -> Iterator[str]:
    for claim, index in zip(claims.objects, chosen, strict=True):
        for attribute in ("shape", "colour", "size"):
            said, is_so = getattr(claim, attribute), getattr(seen[index], attribute)
            if said not in (None, is_so):
                yield f"the {attribute} of {_words(claim)} is {is_so}"
    for first, relation, second in claims.relations:
        if not _holds(relation, chosen[first], chosen[second], seen):
            yield f"{_words(claims.objects[first])} is not {relation} {_words(claims.objects[second])}"


def _words(claim: ObjectClaim) -> str:
    return " ".join(["the", *filter(None, (claim.size, claim.colour)), claim.shape or "object"])


def _holds(relation: str, first: int, second: int, seen: tuple[Seen, ...]) -> bool:
    """Left of and above: beside it, at most 45° from the axis and not overlapping along it by more than 2 pixels."""
    if relation == "inside":
        return seen[first].inside == second
    axis = ("left of", "above").index(relation)
    distance = [seen[second].centre[side] - seen[first].centre[side] for side in (0, 1)]
    overlap = seen[first].box[2 + axis] - seen[second].box[axis]
    return distance[axis] > abs(distance[1 - axis]) and overlap <= 2


def _labels(pixels: Ints) -> tuple[str | None, Ints]:
    """The background's name, and for each pixel what it belongs to by its own colour."""
    chroma, grey = np.ptp(pixels, axis=2), pixels.mean(axis=2)
    edge = np.ones(grey.shape, dtype=bool)
    edge[2:-2, 2:-2] = False
    plain = edge & (chroma < MIN_CHROMA)
    value = float(np.median(grey[plain])) if plain.sum() > edge.sum() / 2 else math.inf
    names = [name for name, (low, high) in BACKGROUND_VALUES.items() if low <= value <= high]
    labels = np.where(np.abs(grey - value) > UNLIKE_BACKGROUND, NAMELESS, BACKGROUND)
    coloured = chroma >= MIN_CHROMA
    labels[coloured] = 1 + _colour_numbers(pixels[coloured])
    return (names[0] if names else None), labels


def _colour_numbers(pixels: Ints) -> Ints:
    """Index in `COLOURS` of the hue of each pixel (n, 3)."""
    red, green, blue = pixels.T
    chroma = np.maximum(np.ptp(pixels, axis=1), 1)
    largest = pixels.argmax(axis=1)
    sector = np.choose(largest, [(green - blue) / chroma, (blue - red) / chroma + 2, (red - green) / chroma + 4])
    numbers: Ints = np.searchsorted(HUE_LIMITS, sector * 60 % 360, side="right") % len(COLOURS)
    return numbers


AROUND = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
MAX_GROWTH = 4
"""Pixels by which an area grows back along its own thin parts: the tips of a star, a ring's soft stroke."""


def _without_rims(labels: Ints, pixels: Ints) -> Ints:
    """Labels in which what is thinner than 3 pixels has become part of its neighbours.

    Where two colours meet, mixed pixels have the hue of a third. Each takes over the label, of those beside it, whose
    mean colour in the picture is nearest.
    """
    counts = sum((_shifted(labels, shift) == labels).astype(np.int64) for shift in AROUND)
    blocks = np.where(counts == len(AROUND), 1, 0)
    kept = np.maximum.reduce([blocks, *(_shifted(blocks, shift) for shift in AROUND)]) > 0
    known = [label for label in range(NAMELESS + 1) if (kept & (labels == label)).any()]
    if not known:  # a picture of nothing but noise
        return np.full_like(labels, NAMELESS)
    means = np.array([pixels[kept & (labels == label)].mean(axis=0) for label in known])
    result = np.where(kept, labels, -1)
    for _ in range(MAX_GROWTH):
        rows, columns = np.nonzero(result < 0)
        if not len(rows):
            break
        beside = np.stack([_shifted(result, shift)[rows, columns] for shift in AROUND])  # (8, n)
        distances = np.linalg.norm(pixels[rows, columns] - means[:, None], axis=2)  # (labels, n)
        offered = np.stack([(beside == label).any(axis=0) for label in known])
        nearest = np.where(offered, distances, np.inf).argmin(axis=0)
        result[rows, columns] = np.where(offered.any(axis=0), np.array(known)[nearest], -1)
    return np.where(result < 0, BACKGROUND, result)


def _shifted(values: Ints, shift: tuple[int, int]) -> Ints:
    """Of each pixel the neighbour's value; beyond the edge the nearest pixel's."""
    height, width = values.shape
    padded = np.pad(values, 1, mode="edge")
    return padded[1 + shift[0] : 1 + shift[0] + height, 1 + shift[1] : 1 + shift[1] + width]


def _pieces(labels: Ints) -> list[Piece]:
    """The connected areas, without specks."""
    height, width = labels.shape
    starts = np.ones_like(labels, dtype=bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    runs = np.cumsum(starts).reshape(labels.shape) - 1  # pixels beside each other in a row
    parents = list(range(int(runs.max()) + 1))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    meet = labels[1:] == labels[:-1]
    for pair in np.unique(runs[:-1][meet] * len(parents) + runs[1:][meet]).tolist():
        upper, lower = divmod(pair, len(parents))
        parents[root(lower)] = root(upper)
    roots = np.array([root(run) for run in range(len(parents))])[runs]
    names, areas = np.unique(roots, return_counts=True)
    pieces = []
    for name, area in zip(names.tolist(), areas.tolist(), strict=True):
        if area >= SPECK * height * width:
            mask = roots == name
            rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
            box = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
            pieces.append(Piece(label=int(labels[rows[0], mask[rows[0]].argmax()]), mask=mask, area=area, box=box))
    return pieces


def _touches_edge(piece: Piece) -> bool:
    height, width = piece.mask.shape
    left, top, right, bottom = piece.box
    return left == 0 or top == 0 or right == width or bottom == height


def _surrounds(outer: Piece, inner: Piece) -> bool:
    """Whether `inner` is within the box of `outer`, which is met in all four directions from its middle."""
    if not all(outer.box[side] <= inner.box[side] and inner.box[2 + side] <= outer.box[2 + side] for side in (0, 1)):
        return False
    column, row = (round(part) for part in inner.middle)
    across, down = outer.mask[row], outer.mask[:, column]
    return bool(across[:column].any() and across[column:].any() and down[:row].any() and down[row:].any())


def _seen(piece: Piece, objects: list[Piece], holes: list[Piece], pixels: Ints) -> Seen:
    height, width = piece.mask.shape
    around = [number for number, other in enumerate(objects) if other is not piece and _surrounds(other, piece)]
    gaps = [hole for hole in holes if _surrounds(piece, hole)]
    within = [other for other in objects if other is not piece and _surrounds(piece, other)]
    filled = np.logical_or.reduce([piece.mask, *(part.mask for part in gaps + within)])
    rows, columns = np.nonzero(filled)
    centre = float(columns.mean()), float(rows.mean())
    extent = max(piece.box[2] - piece.box[0], piece.box[3] - piece.box[1]) / math.sqrt(height * width)
    sizes = [size for size, (low, high) in SIZE_RANGES.items() if low <= extent < high]
    return Seen(
        shape=_shape(filled, centre, sum(gap.area for gap in gaps) / filled.sum()),
        colour=_colour(piece, pixels),
        size=sizes[0] if sizes else None,
        centre=centre,
        box=piece.box,
        inside=around[-1] if around else None,  # the smallest of them
    )


def _colour(piece: Piece, pixels: Ints) -> str | None:
    typical = np.median(pixels[piece.mask], axis=0).astype(np.int64)
    if piece.label == NAMELESS or np.ptp(typical) < SURE_CHROMA:
        return None
    return COLOURS[int(_colour_numbers(typical[None])[0])]


CORNERED = {3: ("triangle", 0.14, 0.36), 4: ("square", 0.07, 0.19), 5: ("star", 0.12, 0.40)}
"""By waves per turn the shape that has them, and their amplitude in it."""
MAX_STRETCH, ROUND = 0.15, 0.05
"""Amplitude of two waves per turn, as an oval has them, from which on nothing is recognised; of any that is round."""


def _shape(filled: Bools, centre: tuple[float, float], hole: float) -> str | None:
    """By how the outline's distance from the centre goes up and down on the way around, and by the hole's share."""
    waves = _waves(filled, centre)
    strongest = int(waves[3:7].argmax()) + 3
    if waves[2] > MAX_STRETCH:
        return None
    if waves[strongest] < ROUND and hole >= RING_HOLE[0]:
        return "ring" if hole <= RING_HOLE[1] else None
    if waves[strongest] < ROUND:
        return "circle"
    shape, least, most = CORNERED.get(strongest, (None, 0.0, 0.0))
    return shape if least <= waves[strongest] <= most and hole < RING_HOLE[0] else None


def _waves(filled: Bools, centre: tuple[float, float]) -> Floats:
    """Amplitudes by waves per turn of the outline's distance from the centre, over its mean."""
    height, width = filled.shape
    angles = np.arange(96) * (2 * math.pi / 96)
    radii = np.arange(0, 0.5 * math.hypot(height, width), 0.25)
    columns = np.round(centre[0] + np.cos(angles)[:, None] * radii).astype(np.int64)
    rows = np.round(centre[1] + np.sin(angles)[:, None] * radii).astype(np.int64)
    framed = np.pad(filled, 1)
    hits = framed[np.clip(rows + 1, 0, height + 1), np.clip(columns + 1, 0, width + 1)]  # (angles, radii)
    spectrum = np.abs(np.fft.rfft(hits.sum(axis=1)))
    amplitudes: Floats = 2 * spectrum / max(spectrum[0], 1e-9)
    return amplitudes
