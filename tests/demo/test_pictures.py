"""What the small models draw is what they are told, on captions that they were never trained with.

Few captions and few steps, so with room below the figures of docs/demo.md, which are over many.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from zimage import ZImagePipeline
from zimage.training import judge
from zimage.training.captions import evaluation_captions
from zimage.training.evaluate import Recipe, adherence, draw

RECIPE = Recipe(steps=12, shift=3.0, guidance_scale=4.0)
"""Of few steps, so with more guidance than the model's own, and with more of them late."""
TURBO_RECIPE = Recipe(steps=8, shift=3.0, sampler="dpmpp_2m", guidance_scale=0.0)
COUNT = 32


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
    assert right(demo, kind, language, RECIPE) >= least


@pytest.mark.parametrize(
    ("kind", "language", "least"),
    [("single", "en", 0.87), ("single", "zh", 0.87), ("pair", "en", 0.8), ("pair", "zh", 0.8)],
)
def test_turbo_draws_them_in_eight_evaluations(turbo: Any, kind: str, language: str, least: float) -> None:
    assert right(turbo, kind, language, TURBO_RECIPE) >= least


def test_in_eight_evaluations_turbo_is_better(demo: Any, turbo: Any) -> None:
    """As many evaluations without guidance, and also as many steps with it."""
    distilled = right(turbo, "pair", "en", TURBO_RECIPE)
    assert distilled >= right(demo, "pair", "en", replace(RECIPE, steps=8, guidance_scale=0.0)) + 0.1
    assert distilled >= right(demo, "pair", "en", replace(RECIPE, steps=4))


def test_guidance_makes_pictures_follow_their_captions(demo: Any) -> None:
    without = right(demo, "pair", "en", replace(RECIPE, guidance_scale=0.0))
    assert right(demo, "pair", "en", RECIPE) >= without + 0.1


@pytest.mark.long
def test_a_negative_prompt_keeps_its_colour_away_and_nothing_else(demo: Any) -> None:
    captions = evaluation_captions("open", 2 * COUNT, 0)

    def shares(negative: str) -> tuple[float, float]:
        """Of pictures with something red, and of those that are as asked."""
        recipe = replace(RECIPE, steps=10, negative_prompt=negative)
        pictures = draw(demo, [text for text, _ in captions], range(len(captions)), recipe)
        readings = [judge.read(picture) for picture in pictures]
        red = [any(one.colour == "red" for one in reading.objects) for reading in readings]
        right = [judge.agrees(reading, claims) for reading, (_, claims) in zip(readings, captions, strict=True)]
        return sum(red) / len(red), sum(right) / len(right)

    (red, right), (red_without, right_without) = shares("red"), shares("")
    assert red < red_without / 4
    assert right > right_without - 0.1
