"""What the small models draw is what they are told, on captions that they were never trained with.

Few captions and few steps, so with room below the figures of docs/demo.md, which are over many.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from zimage import ZImagePipeline
from zimage.training import judge
from zimage.training.captions import evaluation_captions
from zimage.training.evaluate import Recipe, adherence, draw

RECIPE = Recipe(steps=20, shift=6.0, guidance_scale=4.0)
COUNT = 48


@pytest.fixture(scope="module")
def demo() -> Any:
    return ZImagePipeline.from_pretrained("demo", dtype="float32", device="cpu")


def right(pipe: Any, kind: str, language: str, recipe: Recipe) -> float:
    return adherence(pipe, evaluation_captions(kind, COUNT, 0, language), 0, recipe)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("kind", "least"), [("single", 0.85), ("pair", 0.7)])
def test_captions_are_drawn_as_they_say(demo: Any, kind: str, language: str, least: float) -> None:
    assert right(demo, kind, language, RECIPE) >= least


def test_guidance_makes_pictures_follow_their_captions(demo: Any) -> None:
    without = right(demo, "pair", "en", replace(RECIPE, guidance_scale=0.0))
    assert right(demo, "pair", "en", RECIPE) >= without + 0.1


def test_a_negative_prompt_keeps_its_colour_away(demo: Any) -> None:
    captions = [text for text, _ in evaluation_captions("open", 120, 0)]

    def share(negative: str) -> float:
        recipe = replace(RECIPE, steps=12, negative_prompt=negative)
        readings = map(judge.read, draw(demo, captions, range(len(captions)), recipe))
        colours = Counter(one.colour for reading in readings for one in reading.objects[:1])
        assert len(colours) >= 5  # the others are still there
        return colours["red"] / len(captions)

    assert share("red") < share("") / 4
