"""The recipe of a relay's picture: both parts, read back as they were written, and nothing else is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from zimage.errors import RequestError
from zimage.files.parameters import parameters_text
from zimage.files.recipe import Recipe
from zimage.request import GenerationRequest
from zimage.variants import BASE, TURBO

RUNTIME = {"zimage": "0.1.0", "dtype": "float32"}
PIXELS = "0123456789abcdef" * 4


def part(variant: Any, **options: Any) -> Recipe:
    model = {"source": f"some/{variant.name}", "revision": "", "variant": variant.name, "fingerprint": variant.name}
    request = GenerationRequest(**{"prompt": "ein Fuchs", "seed": 7, **options}).resolve(variant)
    return Recipe(request, model, RUNTIME, PIXELS)


def make() -> Recipe:
    return replace(part(BASE, negative_prompt="unscharf"), handover=0.75, turbo=part(TURBO))


def test_json_gives_the_same_recipe_back() -> None:
    recipe = make()
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.to_json() == recipe.to_json()
    assert again.turbo == part(TURBO)
    assert again.handover == 0.75
    assert "relay" not in json.loads(part(BASE).to_json())


def test_the_parameters_say_it() -> None:
    assert "Handover to Turbo: 0.75" in parameters_text(make())
    assert "Handover" not in parameters_text(part(BASE))


def changed(document: dict[str, Any], *path: str, value: Any) -> None:
    *into, last = path
    for name in into:
        document = document[name]
    document[last] = value


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no object": (lambda one: changed(one, "relay", value=[]), "relay must be an object"),
    "nothing": (lambda one: changed(one, "relay", value=None), "relay must be an object"),
    "more in it": (lambda one: changed(one, "relay", "more", value=1), "relay must be an object"),
    "no recipe": (lambda one: changed(one, "relay", "turbo", value="x"), "a recipe without a relay"),
    "a relay of relays": (lambda one: changed(one, "relay", "turbo", "relay", value={}), "a recipe without a relay"),
    "no number": (lambda one: changed(one, "relay", "handover", value="0.7"), "handover must be a number"),
    "no noise level": (lambda one: changed(one, "relay", "handover", value=7), "handover must be a number"),
    "the end": (lambda one: changed(one, "relay", "handover", value=0), "not of one picture"),
    "the start": (lambda one: changed(one, "relay", "handover", value=1), "not of one picture"),
    "another seed": (lambda one: changed(one, "relay", "turbo", "request", "seed", value=8), "not of one picture"),
    "another text": (lambda one: changed(one, "relay", "turbo", "request", "prompt", value="x"), "not of one picture"),
    "another size": (lambda one: changed(one, "relay", "turbo", "request", "width", value=512), "not of one picture"),
    "other pixels": (lambda one: changed(one, "relay", "turbo", "pixels", value="a" * 64), "not of one picture"),
    "base twice": (
        lambda one: changed(one, "relay", "turbo", value=json.loads(part(BASE).to_json())),
        "not of one picture",
    ),
    "what no model can": (
        lambda one: changed(one, "relay", "turbo", "request", "guidance_scale", value=4.0),
        "is not valid",
    ),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=list(CHANGES))
def test_what_is_not_one_picture_of_two_models_is_refused(change: Callable[[dict[str, Any]], None], said: str) -> None:
    document = json.loads(make().to_json())
    change(document)
    with pytest.raises(RequestError, match=said):
        Recipe.from_json(json.dumps(document))


def test_a_handover_needs_someone_to_hand_over_to() -> None:
    with pytest.raises(RequestError, match="nobody to hand over to"):
        replace(part(BASE), handover=0.5)


def test_a_hostile_depth_is_refused() -> None:
    text = json.dumps(json.loads(part(BASE).to_json()) | {"relay": {"handover": 0.5, "turbo": {}}})
    for _ in range(8):
        text = text.replace('"turbo": {}', f'"turbo": {text}')
    with pytest.raises(RequestError):
        Recipe.from_json(text)
