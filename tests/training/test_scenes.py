"""Scenes: examples depend on seed and index alone, pictures show what the scene says, held-out ones never come."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
import pytest

from zimage.training import world
from zimage.training.scenes import PALETTE, draw_scene, example, render
from zimage.training.world import Scene, SceneObject

Mask = npt.NDArray[np.bool_]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(5)
    return [draw_scene(rng, canvas=world.CANVASES[number % 3]) for number in range(3000)]


def masks(scene: Scene) -> list[Mask]:
    """Of each object, drawn alone on black, the pixels that it covers by a quarter and more."""
    alone = [render(replace(scene, background="black", objects=(drawn,))) for drawn in scene.objects]
    return [
        picture.max(axis=2) > max(PALETTE[drawn.colour]) / 4
        for picture, drawn in zip(alone, scene.objects, strict=True)
    ]


def boxes(scene: Scene) -> list[tuple[int, int, int, int]]:
    found = []
    for mask in masks(scene):
        rows, columns = np.nonzero(mask)
        found.append((int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1))
    return found


def large(shape: str, *, colour: str = "red", background: str = "black", canvas: tuple[int, int] = (128, 128)) -> Scene:
    """One object in the middle that is half as wide as a square picture."""
    drawn = SceneObject(shape=shape, colour=colour, size="large", extent=0.5, x=0.5, y=0.5)
    return Scene(width=canvas[0], height=canvas[1], background=background, objects=(drawn,))


def test_an_example_depends_on_seed_and_index_alone() -> None:
    forwards = {index: example(3, index) for index in range(6)}
    backwards = {index: example(3, index) for index in reversed(range(6))}
    for index, one in forwards.items():
        again = backwards[index]
        assert np.array_equal(one.image, again.image)
        assert (one.caption, one.claims, one.scene, one.language) == (
            again.caption,
            again.claims,
            again.scene,
            again.language,
        )
    assert len({one.scene for one in forwards.values()}) == 6
    assert example(4, 0).scene != forwards[0].scene


def test_an_example_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state(legacy=False)["state"]
    example(0, 0)
    after = np.random.get_state(legacy=False)["state"]
    assert before["pos"] == after["pos"]
    assert np.array_equal(before["key"], after["key"])


@pytest.mark.parametrize("canvas", world.CANVASES)
def test_an_example_is_as_asked(canvas: tuple[int, int]) -> None:
    for objects, language in product((1, 2, 3), ("en", "zh")):
        one = example(1, 9, canvas=canvas, language=language, objects=objects)
        assert one.image.shape == (canvas[1], canvas[0], 3)
        assert one.image.dtype == np.uint8
        assert len(one.scene.objects) == objects
        assert one.language == language
        assert one.caption.isascii() is (language == "en")


@pytest.mark.parametrize("objects", [0, 4])
def test_there_are_one_to_three_objects(objects: int) -> None:
    with pytest.raises(ValueError, match="objects must be 1, 2 or 3"):
        example(0, 0, objects=objects)


def test_how_often_there_are_how_many(scenes: list[Scene]) -> None:
    counts = Counter(len(scene.objects) for scene in scenes)
    assert counts[1] / len(scenes) == pytest.approx(0.45, abs=0.04)
    assert counts[2] / len(scenes) == pytest.approx(0.45, abs=0.04)
    pairs = [scene.relations for scene in scenes if len(scene.objects) == 2]
    assert all(len(relations) == 1 for relations in pairs)
    shares = Counter(relations[0][1] for relations in pairs)
    assert min(shares[relation] for relation in world.RELATIONS) > 0.15 * len(pairs)


def test_stars_are_drawn_twice_as_often_as_other_shapes(scenes: list[Scene]) -> None:
    drawn = Counter(scene.objects[0].shape for scene in scenes if len(scene.objects) == 1)
    assert sorted(drawn) == sorted(world.SHAPES)
    for shape, count in drawn.items():
        assert count / drawn.total() == pytest.approx(1 / 3 if shape == "star" else 1 / 6, abs=0.035)


@pytest.mark.parametrize("canvas", world.CANVASES)
def test_sizes_in_pixels(canvas: tuple[int, int]) -> None:
    """Of every shape in both sizes, as measured in the picture."""
    rng, seen = np.random.default_rng(1), set()
    unit = math.sqrt(canvas[0] * canvas[1])
    for _ in range(150):
        scene = draw_scene(rng, canvas=canvas)
        for drawn, (left, top, right, bottom) in zip(scene.objects, boxes(scene), strict=True):
            longer = max(right - left, bottom - top)
            low, high = (26, 37) if drawn.size == "small" else (48, 88)
            assert low <= longer <= high
            assert longer / unit == pytest.approx(drawn.extent, abs=2.2 / unit)
            assert ((left + right) / 2 / canvas[0], (top + bottom) / 2 / canvas[1]) == pytest.approx(
                (drawn.x, drawn.y), abs=1.5 / min(canvas)
            )
            seen.add((drawn.shape, drawn.size))
    assert seen == set(product(world.SHAPES, world.SIZES))


@pytest.mark.parametrize("canvas", world.CANVASES)
def test_shapes_are_undistorted(canvas: tuple[int, int]) -> None:
    for shape, ratio in (("circle", 1.0), ("square", 1.0), ("ring", 1.0), ("triangle", math.sqrt(3) / 2)):
        left, top, right, bottom = boxes(large(shape, canvas=canvas))[0]
        assert (bottom - top) / (right - left) == pytest.approx(ratio, abs=0.03)


def test_areas_of_the_shapes() -> None:
    """Against the formulas of plane geometry, at a radius of 32 or a width of 64."""
    areas = {
        "circle": math.pi * 32**2,
        "square": 64**2,
        "triangle": 64**2 * math.sqrt(3) / 4,
        "ring": math.pi * 32**2 * (1 - 0.58**2),
        "star": 5 * 0.46 * (32 / math.sin(math.radians(72))) ** 2 * math.sin(math.radians(36)),
    }
    assert set(areas) == set(world.SHAPES)
    for shape, area in areas.items():
        assert render(large(shape))[..., 0].sum() / PALETTE["red"][0] == pytest.approx(area, rel=0.02)


def test_edges_are_antialiased() -> None:
    picture = render(large("circle", colour="blue", background="white"))
    mixed = (picture != PALETTE["blue"]).any(axis=2) & (picture != PALETTE["white"]).any(axis=2)
    assert 100 < mixed.sum() < 400
    amount = 255.0 - picture[..., 0]
    for axis in (0, 1):
        assert (amount.sum(axis=axis) * np.arange(128)).sum() / amount.sum() == pytest.approx(63.5, abs=0.1)


def test_objects_keep_apart_and_off_the_edge(scenes: list[Scene]) -> None:
    for scene in [scene for scene in scenes if len(scene.objects) > 1][:200]:
        found = boxes(scene)
        for left, top, right, bottom in found:
            assert min(left, top) >= 3
            assert right <= scene.width - 3
            assert bottom <= scene.height - 3
        if scene.relations[:1] != ((0, "inside", 1),):
            for one, other in combinations(found, 2):
                gaps = (max(one[side] - other[side + 2], other[side] - one[side + 2]) for side in (0, 1))
                assert max(gaps) >= 8


def test_what_is_inside_is_surrounded(scenes: list[Scene]) -> None:
    """All of it, and 2 pixels around it, are in the container or in its hole, and it is seen in front."""
    nested = [scene for scene in scenes if scene.relations[:1] == ((0, "inside", 1),)][:150]
    for scene in nested:
        content, container = scene.objects
        assert (content.size, container.size) == ("small", "large")
        inner, outer = masks(scene)
        grown = np.logical_or.reduce([np.roll(inner, shift, axis) for shift in (-2, 2) for axis in (0, 1)])
        if container.shape == "ring":
            assert not (grown & outer).any()
            outer = np.logical_or.accumulate(outer, 1) & np.logical_or.accumulate(outer[:, ::-1], 1)[:, ::-1]
        assert outer[grown].all()
        middle = round(content.y * scene.height), round(content.x * scene.width)
        assert tuple(render(scene)[middle]) == PALETTE[content.colour]
    assert {scene.objects[1].shape for scene in nested} == set(world.CONTAINERS)
    assert {scene.objects[0].shape for scene in nested} == set(world.CONTENTS)


def test_relations_are_clear_in_the_picture(scenes: list[Scene]) -> None:
    for scene in [scene for scene in scenes if scene.relations][:150]:
        middles = [np.argwhere(mask).mean(axis=0)[::-1] for mask in masks(scene)]
        for first, relation, second in scene.relations:
            across, down = middles[second] - middles[first]
            if relation == "left of":
                assert across > 1.4 * abs(down)
            elif relation == "above":
                assert down > 1.4 * abs(across)
            else:
                assert math.hypot(across, down) < 1


def test_no_scene_is_held_out(scenes: list[Scene]) -> None:
    """Asked of all combinations that are in the scenes, the small share that is held out never is."""
    for scene in scenes:
        names = [(drawn.shape, drawn.colour) for drawn in scene.objects]
        for first, relation, second in scene.relations:
            assert not world.is_held_out_pair(names[first], relation, names[second])
        if len(scene.objects) == 1:
            (only,) = scene.objects
            assert not world.is_held_out_single(only.shape, only.colour, only.size, scene.background)


def test_how_much_is_held_out() -> None:
    """A trained model is measured with what it has not seen, so which combinations those are must never change."""
    singles = product(world.SHAPES, world.COLOURS, world.SIZES, world.BACKGROUNDS)
    held_out = [words for words in singles if world.is_held_out_single(*words)]
    assert len(held_out) == 24
    assert held_out[:2] == [("circle", "red", "small", "black"), ("circle", "cyan", "small", "grey")]
    things = list(product(world.SHAPES, world.COLOURS))
    pairs = [words for words in product(things, world.RELATIONS, things) if world.is_held_out_pair(*words)]
    assert len(pairs) == 455
    assert pairs[0] == (("circle", "red"), "left of", ("square", "orange"))


def test_the_parts_of_what_is_held_out_are_drawn(scenes: list[Scene]) -> None:
    """Alone and in pairs: every shape in every colour and size, every colour and size on every background."""
    for count in (1, 2):
        some = [(scene, drawn) for scene in scenes if len(scene.objects) == count for drawn in scene.objects]
        shapes = {(drawn.shape, drawn.colour, drawn.size) for _, drawn in some}
        grounds = {(drawn.colour, drawn.size, scene.background) for scene, drawn in some}
        assert len(shapes) == len(world.SHAPES) * len(world.COLOURS) * len(world.SIZES)
        assert len(grounds) == len(world.COLOURS) * len(world.SIZES) * len(world.BACKGROUNDS)


def test_places_are_free(scenes: list[Scene]) -> None:
    """A single small object comes in each ninth of the picture; in the corners less, where the margin is."""
    small = [scene.objects[0] for scene in scenes if len(scene.objects) == 1 and scene.objects[0].size == "small"]
    ninths = Counter((int(drawn.x * 3), int(drawn.y * 3)) for drawn in small)
    assert len(ninths) == 9
    assert min(ninths.values()) > 0.04 * len(small)
