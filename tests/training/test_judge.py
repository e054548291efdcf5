"""The judge: it reads drawn scenes without a mistake, soft and noisy ones too, and refuses what was not claimed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFilter

from zimage.training import judge, world
from zimage.training.judge import Reading, Seen, agrees, mistakes, read
from zimage.training.scenes import PALETTE, draw_scene, render
from zimage.training.world import Claims, ObjectClaim, Scene

Pixels = npt.NDArray[np.uint8]
RED_CIRCLE = Claims(objects=(ObjectClaim(shape="circle", colour="red", size="large"),), background="white")


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, Pixels]]:
    """As many scenes of each aspect ratio, with one object to three."""
    rng = np.random.default_rng(21)
    scenes = [draw_scene(rng, canvas=world.CANVASES[number % 3]) for number in range(360)]
    return [(scene, render(scene)) for scene in scenes]


@pytest.fixture(scope="module")
def readings(drawn: list[tuple[Scene, Pixels]]) -> list[tuple[Scene, Reading]]:
    return [(scene, read(picture)) for scene, picture in drawn]


def everything(scene: Scene) -> Claims:
    objects = tuple(ObjectClaim(shape=one.shape, colour=one.colour, size=one.size) for one in scene.objects)
    return Claims(objects=objects, relations=scene.relations, background=scene.background)


def soft(picture: Pixels, radius: float, noise: float, seed: int) -> Pixels:
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius))).astype(float)
    noisy = blurred + np.random.default_rng(seed).normal(0, noise, picture.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def canvas(background: str | tuple[int, int, int] = "white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (128, 128), background)
    return image, ImageDraw.Draw(image)


def seen(**changes: Any) -> Seen:
    plain = Seen(shape="circle", colour="red", size="large", centre=(64.0, 64.0), box=(32, 32, 96, 96))
    return replace(plain, **changes)


def other(word: str, words: tuple[str, ...], taken: set[str]) -> str:
    return next(one for one in words[words.index(word) :] + words if one not in taken)


def alterations(scene: Scene) -> Iterator[tuple[str, Claims]]:
    """All claims that differ from what is true of the scene in one thing, by what it is."""
    true = everything(scene)
    colours = {one.colour for one in scene.objects}
    for number, one in enumerate(scene.objects):
        for attribute, words, taken in (
            ("colour", world.COLOURS, colours),
            ("shape", world.SHAPES, {one.shape}),
            ("size", world.SIZES, {one.size}),
        ):
            word = other(getattr(one, attribute), words, taken)
            changed = replace(true.objects[number], **{attribute: word})
            yield attribute, replace(true, objects=(*true.objects[:number], changed, *true.objects[number + 1 :]))
    yield "background", replace(true, background=other(scene.background, world.BACKGROUNDS, {scene.background}))
    yield "one too few", replace(true, objects=true.objects[:-1], relations=())
    yield "one too many", replace(true, objects=(*true.objects, ObjectClaim()))
    if len(scene.objects) == 2 and len({(one.shape, one.size) for one in scene.objects}) == 2:
        one, two = true.objects
        exchanged = replace(one, colour=two.colour), replace(two, colour=one.colour)
        yield "colours exchanged", replace(true, objects=exchanged, relations=())
    for first, relation, second in scene.relations:
        yield "relation turned", replace(true, relations=((second, relation, first),))
        for wrong in world.RELATIONS:
            if wrong != relation:
                yield "other relation", replace(true, relations=((first, wrong, second),))


def test_reads_every_scene(readings: list[tuple[Scene, Reading]]) -> None:
    failures = [mistakes(reading, everything(scene)) for scene, reading in readings]
    assert [found for found in failures if found] == []


@pytest.mark.parametrize(("radius", "noise", "least"), [(1.0, 4.0, 0.99), (1.5, 6.0, 0.97)])
def test_reads_soft_and_noisy_scenes(
    drawn: list[tuple[Scene, Pixels]], radius: float, noise: float, least: float
) -> None:
    some = drawn[:180]
    right = [
        agrees(read(soft(picture, radius, noise, number)), everything(scene))
        for number, (scene, picture) in enumerate(some)
    ]
    assert sum(right) / len(right) >= least


def test_reads_grainy_scenes(drawn: list[tuple[Scene, Pixels]]) -> None:
    right = [
        agrees(read(soft(picture, 0.7, 22.0, number)), everything(scene))
        for number, (scene, picture) in enumerate(drawn[:60])
    ]
    assert sum(right) / len(right) > 0.95


def test_refuses_whatever_is_claimed_wrongly(readings: list[tuple[Scene, Reading]]) -> None:
    tried: dict[str, list[bool]] = {}
    for scene, reading in readings:
        for kind, claims in alterations(scene):
            tried.setdefault(kind, []).append(agrees(reading, claims))
    assert len(tried) == 9
    assert min(len(results) for results in tried.values()) > 100
    assert {kind: sum(results) for kind, results in tried.items()} == dict.fromkeys(tried, 0)


def test_where_things_are(readings: list[tuple[Scene, Reading]]) -> None:
    for scene, reading in readings:
        for one in scene.objects:
            (found,) = (thing for thing in reading.objects if thing.colour == one.colour)
            middle = (found.box[0] + found.box[2]) / 2, (found.box[1] + found.box[3]) / 2
            assert middle == pytest.approx((one.x * scene.width, one.y * scene.height), abs=2)
            assert found.box[0] < found.centre[0] < found.box[2]


def test_the_largest_comes_first_and_knows_what_surrounds_it() -> None:
    image, pen = canvas("black")
    pen.ellipse((20, 30, 95, 105), fill=(20, 60, 220))
    pen.rectangle((45, 55, 70, 80), fill=(250, 220, 10))
    reading = read(image)
    assert reading.background == "black"
    assert [(one.shape, one.colour, one.size, one.inside) for one in reading.objects] == [
        ("circle", "blue", "large", None),
        ("square", "yellow", "small", 0),
    ]
    assert reading.objects[0].centre == pytest.approx((57.5, 67.5), abs=0.5)
    assert reading.objects[1].box == (45, 55, 71, 81)


def test_bytes_and_images_are_read_alike(drawn: list[tuple[Scene, Pixels]]) -> None:
    _, picture = drawn[0]
    assert read(picture) == read(Image.fromarray(picture)) == read(Image.fromarray(picture).convert("RGBA"))


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ((200, 0, 0), "red"),
        ((255, 60, 60), "red"),
        ((230, 110, 20), "orange"),
        ((255, 235, 60), "yellow"),
        ((0, 120, 30), "green"),
        ((80, 190, 90), "green"),
        ((90, 210, 230), "cyan"),
        ((60, 90, 230), "blue"),
        ((150, 70, 190), "purple"),
        ((240, 120, 190), "pink"),
        ((150, 140, 145), None),
        ((120, 70, 90), None),
    ],
)
def test_shades_of_a_colour(colour: tuple[int, int, int], name: str | None) -> None:
    image, pen = canvas()
    pen.ellipse((30, 30, 90, 90), fill=colour)
    assert [(one.shape, one.colour) for one in read(image).objects] == [("circle", name)]


@pytest.mark.parametrize(
    ("colour", "name"),
    [((255, 255, 255), "white"), ((225, 222, 220), "white"), ((140, 135, 130), "grey"), ((12, 10, 20), "black")],
)
def test_backgrounds(colour: tuple[int, int, int], name: str) -> None:
    image, pen = canvas(colour)
    pen.rectangle((30, 30, 85, 85), fill=(215, 25, 30))
    assert read(image) == Reading(background=name, objects=read(image).objects)
    assert [(one.shape, one.colour) for one in read(image).objects] == [("square", "red")]


@pytest.mark.parametrize("colour", [(255, 160, 160), (70, 70, 70), (190, 190, 190)])
def test_a_background_that_has_no_name(colour: tuple[int, int, int]) -> None:
    assert read(Image.new("RGB", (128, 128), colour)).background is None


def test_shapes_that_have_no_name() -> None:
    image, pen = canvas()
    pen.ellipse((10, 40, 110, 80), fill="blue")
    oval = read(image)
    image, pen = canvas()
    pen.rectangle((50, 20, 70, 90), fill="blue")
    pen.rectangle((25, 45, 95, 65), fill="blue")
    cross = read(image)
    image, pen = canvas()
    pen.pieslice((20, 20, 90, 90), 0, 270, fill="blue")
    pie = read(image)
    image, pen = canvas()
    pen.rectangle((20, 20, 90, 90), outline="blue", width=12)
    frame = read(image)
    image, pen = canvas()
    pen.arc((20, 20, 90, 90), 40, 330, fill="blue", width=14)
    broken_ring = read(image)
    for reading in (oval, cross, pie, frame, broken_ring):
        assert [(one.shape, one.colour) for one in reading.objects] == [(None, "blue")]


@pytest.mark.parametrize(("width", "size"), [(12, None), (24, "small"), (34, "small"), (48, "large"), (120, None)])
def test_sizes(width: int, size: str | None) -> None:
    image, pen = canvas()
    pen.rectangle((3, 3, 2 + width, 2 + width), fill="blue")
    assert [one.size for one in read(image).objects] == [size]


def test_specks_are_no_objects() -> None:
    image, pen = canvas()
    pen.ellipse((20, 20, 80, 80), fill="red")
    pen.rectangle((110, 110, 115, 115), fill="blue")  # 36 pixels
    pen.line((90, 5, 125, 5), fill="green", width=2)
    assert [(one.shape, one.colour) for one in read(image).objects] == [("circle", "red")]


def test_where_two_colours_meet_there_is_no_third() -> None:
    """Nor a gap that would make a ring of what is around: of all colours, with an edge some pixels wide."""
    for outer, inner in permutations(world.COLOURS, 2):
        image, pen = canvas("black")
        pen.ellipse((20, 20, 95, 95), fill=PALETTE[outer])
        pen.rectangle((45, 45, 70, 70), fill=PALETTE[inner])
        found = read(image.filter(ImageFilter.GaussianBlur(1.5)))
        assert [(one.shape, one.colour) for one in found.objects] == [("circle", outer), ("square", inner)]


def test_what_is_no_speck_is_an_object() -> None:
    image, pen = canvas()
    pen.ellipse((20, 20, 80, 80), fill="red")
    pen.rectangle((105, 105, 115, 115), fill="red")
    pen.rectangle((105, 5, 118, 18), fill=(100, 100, 100))
    assert [one.colour for one in read(image).objects] == ["red", None, "red"]
    assert mistakes(read(image), RED_CIRCLE) == ["3 objects are seen, not 1"]


@pytest.mark.parametrize("colour", ["white", "black", "red"])
def test_nothing_in_the_picture(colour: str) -> None:
    reading = read(Image.new("RGB", (96, 64), colour))
    assert reading.background == (None if colour == "red" else colour)
    assert [(one.colour, one.size) for one in reading.objects] == ([("red", None)] if colour == "red" else [])
    assert not agrees(reading, RED_CIRCLE)


def test_noise_is_no_scene(drawn: list[tuple[Scene, Pixels]]) -> None:
    for seed, size in enumerate([(128, 128), (32, 48)]):
        noise = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
        reading = read(noise)
        assert not any(agrees(reading, everything(scene)) for scene, _ in drawn)


def test_mistakes_in_words() -> None:
    reading = Reading(background="white", objects=(seen(shape=None, colour="blue"),))
    assert mistakes(reading, RED_CIRCLE) == [
        "the shape of the large red circle is None",
        "the colour of the large red circle is blue",
    ]
    assert mistakes(Reading(background=None, objects=(seen(),)), RED_CIRCLE) == ["the background is None, not white"]
    assert mistakes(Reading(background="white", objects=()), RED_CIRCLE) == ["0 objects are seen, not 1"]
    assert mistakes(Reading(background="white", objects=(seen(), seen())), RED_CIRCLE) == ["2 objects are seen, not 1"]
    beside = Claims(objects=(ObjectClaim(colour="red"), ObjectClaim()), relations=((0, "left of", 1),))
    reading = Reading(
        background="white", objects=(seen(), seen(colour="blue", centre=(20.0, 64.0), box=(4, 44, 31, 84)))
    )
    assert mistakes(reading, beside) == ["the red object is not left of the object"]


def test_claims_are_matched_in_any_order() -> None:
    """Also where the first claim fits both objects, and only the other match leaves one for the second."""
    reading = Reading(background="white", objects=(seen(size="small"), seen(colour="blue")))
    assert agrees(reading, Claims(objects=(ObjectClaim(shape="circle"), ObjectClaim(colour="red"))))
    assert agrees(reading, Claims(objects=(ObjectClaim(colour="red"), ObjectClaim(size="large"))))
    assert not agrees(reading, Claims(objects=(ObjectClaim(colour="red"), ObjectClaim(size="small"))))


def test_bare_words_are_true_of_one_object() -> None:
    reading = Reading(background="white", objects=(seen(size="small"), seen(colour="blue")))
    for claim, holds in (
        (ObjectClaim(colour="blue"), True),
        (ObjectClaim(size="small"), True),
        (ObjectClaim(shape="star"), False),
        (ObjectClaim(colour="pink"), False),
    ):
        assert agrees(reading, Claims(objects=(claim,), exact=False)) is holds
        assert not agrees(reading, Claims(objects=(claim,)))
    assert agrees(reading, Claims(background="white", exact=False))
    assert not agrees(reading, Claims(background="black", exact=False))
    assert not agrees(reading, Claims(background="white"))


@pytest.mark.parametrize(
    ("centre", "relation"),
    [((100.0, 64.0), "left of"), ((100.0, 99.0), "left of"), ((99.0, 100.0), "above"), ((64.0, 100.0), "above")],
)
def test_relations(centre: tuple[float, float], relation: str) -> None:
    """From (30, 30): whatever is farther, across or down, decides; what is not apart in it is in no relation."""
    here = seen(centre=(30.0, 30.0), box=(20, 20, 40, 40))
    x, y = centre
    there = seen(centre=centre, box=(int(x) - 10, int(y) - 10, int(x) + 10, int(y) + 10))
    pair = Reading(background="white", objects=(here, there))
    wide = replace(pair, objects=(here, replace(there, box=(int(x) - 65, int(y) - 65, 128, 128))))
    for one in world.RELATIONS:
        claims = Claims(objects=(ObjectClaim(), ObjectClaim()), relations=((0, one, 1),))
        assert agrees(pair, claims) is (one == relation)
        assert not agrees(wide, claims)


def test_shares_no_code_with_what_it_judges() -> None:
    tree = ast.parse(Path(judge.__file__).read_text(encoding="utf-8"))
    own = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert own == ["world"]
