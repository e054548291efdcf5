"""What the small models draw is what they are told, on captions that they were never trained with.

Few captions and few steps, so with room below the figures of docs/demo.md, which are over many.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from math import log2
from statistics import mean
from typing import Any

import pytest

from zimage import ZImagePipeline
from zimage.training import judge
from zimage.training.captions import evaluation_captions
from zimage.training.evaluate import Recipe, adherence, draw
from zimage.training.world import CANVASES, SHAPES, Claims, ObjectClaim

STEPS, EIGHT = 16, 8
pytestmark = pytest.mark.no_cover  # every line is counted in other tests; here that takes a third of the time
COUNT = 32
SEEDS = 40


@pytest.fixture(scope="module")
def demo() -> Any:
    return ZImagePipeline.from_pretrained("demo", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def turbo() -> Any:
    return ZImagePipeline.from_pretrained("demo-turbo", dtype="float32", device="cpu")


@cache
def right(pipe: Any, kind: str, language: str, recipe: Recipe) -> float:
    return adherence(pipe, evaluation_captions(kind, COUNT, 0, language), 0, recipe)


@pytest.mark.parametrize(
    ("kind", "language", "least"),
    [("single", "en", 0.9), ("single", "zh", 0.9), ("pair", "en", 0.8), ("pair", "zh", 0.8)],
)
def test_captions_are_drawn_as_they_say(demo: Any, kind: str, language: str, least: float) -> None:
    assert right(demo, kind, language, Recipe.of(demo, steps=STEPS)) >= least


@pytest.mark.parametrize(
    ("kind", "language", "least"),
    [("single", "en", 0.87), ("single", "zh", 0.87), ("pair", "en", 0.8), ("pair", "zh", 0.8)],
)
def test_turbo_draws_them_in_eight_evaluations(turbo: Any, kind: str, language: str, least: float) -> None:
    assert right(turbo, kind, language, Recipe.of(turbo, steps=EIGHT)) >= least


def test_in_eight_evaluations_turbo_is_better(demo: Any, turbo: Any) -> None:
    """Than as many without guidance, as many with it, and as many steps."""
    distilled = right(turbo, "pair", "en", Recipe.of(turbo, steps=EIGHT))
    assert distilled >= right(demo, "pair", "en", Recipe.of(demo, steps=EIGHT, guidance_scale=0.0)) + 0.1
    assert distilled >= right(demo, "pair", "en", Recipe.of(demo, steps=EIGHT // 2))
    assert distilled >= right(demo, "pair", "en", Recipe.of(demo, steps=EIGHT))


def test_guidance_makes_pictures_follow_their_captions(demo: Any) -> None:
    with_it, without = (
        right(demo, "pair", "en", Recipe.of(demo, steps=STEPS, guidance_scale=scale)) for scale in (4.0, 0.0)
    )
    assert with_it >= without + 0.1


@pytest.mark.long
def test_seeds_differ_more_than_turbos(demo: Any, turbo: Any) -> None:
    """In what a caption leaves open, as bits of entropy, mean over shapes; early steps decide it, so many are taken."""

    def spread(pipe: Any, recipe: Recipe) -> float:
        entropies = []
        for shape in SHAPES[:3]:
            claims = Claims(objects=(ObjectClaim(shape=shape),), background="white")
            pictures = draw(pipe, [f"a {shape} on a white background"] * SEEDS, range(SEEDS), recipe)
            readings = [reading for reading in map(judge.read, pictures) if judge.agrees(reading, claims)]
            seen = Counter(outcome(only) for reading in readings for only in reading.objects)
            shares = [count / seen.total() for count in seen.values()]
            entropies.append(-sum(share * log2(share) for share in shares))
        return mean(entropies)

    assert spread(demo, Recipe.of(demo, steps=25)) > spread(turbo, Recipe.of(turbo, steps=EIGHT))


def outcome(seen: judge.Seen) -> tuple[Any, ...]:
    """Colour, ninth of the picture and size."""
    across, down = (int(3 * middle // CANVASES[0][0]) for middle in seen.centre)
    return seen.colour, across, down, seen.size


@pytest.mark.long
def test_a_negative_prompt_keeps_its_colour_away_and_nothing_else(demo: Any) -> None:
    captions = evaluation_captions("open", 2 * COUNT, 0)

    def shares(negative: str) -> tuple[float, float]:
        """Of pictures with something red, and of those that are as asked."""
        recipe = Recipe.of(demo, steps=10, negative_prompt=negative)
        pictures = draw(demo, [text for text, _ in captions], range(len(captions)), recipe)
        readings = [judge.read(picture) for picture in pictures]
        red = [any(one.colour == "red" for one in reading.objects) for reading in readings]
        right = [judge.agrees(reading, claims) for reading, (_, claims) in zip(readings, captions, strict=True)]
        return sum(red) / len(red), sum(right) / len(right)

    (red, right), (red_without, right_without) = shares("red"), shares("")
    assert red < red_without / 4
    assert right > right_without - 0.1
