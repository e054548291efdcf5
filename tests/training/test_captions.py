"""Captions: their words are those of their claims, their claims are those of the scene, some are never trained on."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from zimage.training import world
from zimage.training.captions import describe, evaluation_captions, phrase
from zimage.training.scenes import draw_scene
from zimage.training.world import Claims, ObjectClaim, Scene

Described = tuple[str, Claims, Scene]

CHINESE = {
    **dict(zip(("红色", "橙色", "黄色", "绿色", "青色", "蓝色", "紫色", "粉色"), world.COLOURS, strict=True)),
    **{"圆环": "ring", "圆形": "circle", "圆": "circle", "正方形": "square", "方块": "square", "三角形": "triangle"},
    **{"五角星": "star", "星形": "star", "大": "large", "小": "small"},
    **{"白色": "white", "灰色": "grey", "黑色": "black"},
}
ENGLISH = {
    **{word: word for word in (*world.COLOURS, *world.SHAPES, *world.SIZES, *world.BACKGROUNDS)},
    **{"little": "small", "big": "large"},
}


@pytest.fixture(scope="module")
def english() -> list[Described]:
    return drawn("en")


@pytest.fixture(scope="module")
def chinese() -> list[Described]:
    return drawn("zh")


def drawn(language: str) -> list[Described]:
    rng = np.random.default_rng(7)
    scenes = [draw_scene(rng) for _ in range(2000)]
    return [(*describe(scene, rng, language), scene) for scene in scenes]


def meanings(caption: str) -> list[str]:
    """The words of the world that a caption has, in its order."""
    if caption.isascii():
        return [ENGLISH[word] for word in re.findall("[a-z]+", caption) if word in ENGLISH]
    pattern = "|".join(sorted(CHINESE, key=len, reverse=True))
    return [CHINESE[word] for word in re.findall(pattern, caption)]


def claimed(claims: Claims) -> list[str]:
    words = [word for one in claims.objects for word in (one.shape, one.colour, one.size)]
    return [word for word in (*words, claims.background) if word is not None]


def red_and_blue(relation: str) -> Claims:
    objects = ObjectClaim(shape="circle", colour="red"), ObjectClaim(shape="square", colour="blue")
    return Claims(objects=objects, relations=((0, relation, 1),))


def all_wordings(claims: Claims, language: str, draws: int = 2500) -> Counter[str]:
    rng = np.random.default_rng(0)
    return Counter(phrase(claims, rng, language) for _ in range(draws))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_words_are_those_of_the_claims(language: str, request: pytest.FixtureRequest) -> None:
    for caption, claims, _ in request.getfixturevalue({"en": "english", "zh": "chinese"}[language]):
        assert Counter(meanings(caption)) == Counter(claimed(claims)), caption


def test_the_claims_are_those_of_the_scene(english: list[Described]) -> None:
    for _, claims, scene in english:
        assert claims.background in (None, scene.background)
        assert set(claims.relations) <= set(scene.relations)
        if claims.exact:
            assert len(claims.objects) == len(scene.objects)
            for claim, shown in zip(claims.objects, scene.objects, strict=True):
                assert claim.shape in (None, shown.shape)
                assert claim.colour in (None, shown.colour)
                assert claim.size in (None, shown.size)
                assert (claim.shape, claim.colour) != (None, None)
        else:
            words = {word for shown in scene.objects for word in (shown.shape, shown.colour, shown.size)}
            assert set(claimed(claims)) <= words | {scene.background}


def test_each_object_has_the_attributes_that_it_was_given() -> None:
    """Shape, colour and size of one object come together, before those of the next."""
    objects = (
        ObjectClaim(shape="circle", colour="red", size="small"),
        ObjectClaim(shape="square", colour="blue", size="large"),
        ObjectClaim(shape="star", colour="pink"),
    )
    for language in ("en", "zh"):
        for caption in all_wordings(Claims(objects=objects), language, 300):
            found = meanings(caption)
            groups = [set(claimed(Claims(objects=(one,)))) for one in objects]
            while found:
                group = next(group for group in groups if found[0] in group)
                assert set(found[: len(group)]) == group, caption
                found = found[len(group) :]


@pytest.mark.parametrize(
    ("relation", "english", "chinese"),
    [
        (
            "left of",
            r"red circle (to the )?left of (a )?blue square|red circle on the left, (a )?blue square on the right|"
            r"blue square (to the )?right of (a )?red circle",
            r"红色的?圆形?在(一个)?蓝色的?(正方形|方块)的?左边|蓝色的?(正方形|方块)在(一个)?红色的?圆形?的右边|"
            r"蓝色的?(正方形|方块)的左边有(一个)?红色的?圆形?|左边是(一个)?红色的?圆形?，右边是(一个)?蓝色的?(正方形|方块)",
        ),
        (
            "above",
            r"red circle above (a )?blue square|red circle at the top, (a )?blue square at the bottom|"
            r"blue square (below|under) (a )?red circle",
            r"红色的?圆形?在(一个)?蓝色的?(正方形|方块)(的上面|上方)|蓝色的?(正方形|方块)在(一个)?红色的?圆形?的下面|"
            r"蓝色的?(正方形|方块)的上面有(一个)?红色的?圆形?|上面是(一个)?红色的?圆形?，下面是(一个)?蓝色的?(正方形|方块)",
        ),
        (
            "inside",
            r"red circle (inside|in) (a )?blue square|blue square with (a )?red circle inside|"
            r"blue square around (a )?red circle",
            r"红色的?圆形?在(一个)?蓝色的?(正方形|方块)的?里面|蓝色的?(正方形|方块)里面有(一个)?红色的?圆形?",
        ),
    ],
)
def test_relations_are_worded_the_right_way_round(relation: str, english: str, chinese: str) -> None:
    for language, pattern in (("en", english), ("zh", chinese)):
        wordings = all_wordings(red_and_blue(relation), language)
        assert [text for text in wordings if not re.search(pattern, text)] == []
        assert len(wordings) > 10


def test_all_ways_to_name_an_object() -> None:
    said = set(all_wordings(Claims(objects=(ObjectClaim(shape="ring", colour="orange"),)), "en"))
    frames = {"{}", "there is {}", "a picture of {}", "an image of {}"}
    assert said == {frame.format("an orange ring") for frame in frames} | {"orange ring"}
    assert set(all_wordings(Claims(objects=(ObjectClaim(colour="red"),)), "en")) >= {"a red thing", "something red"}
    assert set(all_wordings(Claims(objects=(ObjectClaim(shape="ring"),)), "zh")) == {
        "一个圆环",
        "一张图片，一个圆环",
        "图中：一个圆环",
    }


def test_bare_words() -> None:
    """They alone are said without an article, so that no text has two meanings."""
    red, star, large = (
        Claims(objects=(claim,), exact=False)
        for claim in (ObjectClaim(colour="red"), ObjectClaim(shape="star"), ObjectClaim(size="large"))
    )
    ground = Claims(background="black", exact=False)
    assert [set(all_wordings(bare, "en", 50)) for bare in (red, star, large, ground)] == [
        {"red"},
        {"star"},
        {"large", "big"},
        {"black background", "a black background"},
    ]
    assert [set(all_wordings(bare, "zh", 50)) for bare in (red, star, large, ground)] == [
        {"红色"},
        {"五角星", "星形"},
        {"大"},
        {"黑色背景"},
    ]


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_one_text_has_one_meaning(language: str, request: pytest.FixtureRequest) -> None:
    exact: dict[str, set[bool]] = {}
    for caption, claims, _ in request.getfixturevalue(language):
        exact.setdefault(caption, set()).add(claims.exact)
    assert [caption for caption, kinds in exact.items() if len(kinds) > 1] == []


def test_how_often_what_is_said(english: list[Described]) -> None:
    exact = [(claims, scene) for _, claims, scene in english if claims.exact]
    assert 1 - len(exact) / len(english) == pytest.approx(0.1, abs=0.03)
    pairs = [(claims, scene) for _, claims, scene in english if len(scene.objects) == 2]
    full = [
        claims
        for claims, _ in pairs
        if claims.exact and claims.relations and all(one.shape and one.colour for one in claims.objects)
    ]
    assert len(full) / len(pairs) == pytest.approx(0.6, abs=0.05)
    singles = [claims for claims, scene in exact if len(scene.objects) == 1]
    without_colour = sum(claims.objects[0].colour is None for claims in singles) / len(singles)
    assert 0.1 < without_colour < 0.25
    assert 0.4 < sum(claims.background is not None for claims in singles) / len(singles) < 0.6


def test_captions_are_short_and_varied(english: list[Described], chinese: list[Described]) -> None:
    assert max(len(caption.split()) for caption, *_ in english) <= 22
    assert sum(len(caption.split()) < 16 for caption, *_ in english) > 0.95 * len(english)
    assert max(len(caption) for caption, *_ in chinese) <= 45
    assert len({caption for caption, *_ in english}) > 1200
    assert len({caption for caption, *_ in chinese}) > 1200


def test_the_language_is_drawn_where_none_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    scene = draw_scene(rng)
    captions = [describe(scene, rng)[0] for _ in range(600)]
    assert sum(caption.isascii() for caption in captions) / 600 == pytest.approx(0.6, abs=0.07)


def test_the_same_draw_gives_the_same_caption() -> None:
    scene = draw_scene(np.random.default_rng(0))
    said = [describe(scene, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert said[0] == said[1]
    assert said[0] != said[2]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("kind", "combinations"), [("single", 24), ("pair", 357), ("open", 60)])
def test_evaluation_captions(kind: str, combinations: int, language: str) -> None:
    made = evaluation_captions(kind, combinations + 10, 3, language)
    assert made == evaluation_captions(kind, combinations + 10, 3, language)
    assert made[:5] == evaluation_captions(kind, 5, 3, language)
    assert [claims for _, claims in made] != [claims for _, claims in evaluation_captions(kind, len(made), 4, language)]
    assert len({claims for _, claims in made[:combinations]}) == len({claims for _, claims in made}) == combinations
    for caption, claims in made:
        assert caption.isascii() is (language == "en")
        assert Counter(meanings(caption)) == Counter(claimed(claims))
        assert claims.exact


def test_what_evaluation_captions_name() -> None:
    for _, claims in evaluation_captions("single", 24, 0):
        (only,) = claims.objects
        assert world.is_held_out_single(only.shape or "", only.colour or "", only.size or "", claims.background or "")
    for _, claims in evaluation_captions("pair", 357, 0):
        first, second = ((one.shape or "", one.colour or "") for one in claims.objects)
        assert claims.relations[0][0::2] == (0, 1)
        assert world.is_held_out_pair(first, claims.relations[0][1], second)
        assert first[1] != second[1]
    for _, claims in evaluation_captions("open", 60, 0):
        (only,) = claims.objects
        assert only.colour is None
        assert only.shape is not None


def test_training_never_sees_the_pairs_of_the_evaluation(english: list[Described]) -> None:
    """Nor the singles; of what is not held out, as many would be among these scenes."""
    pairs = {claims for _, claims in evaluation_captions("pair", 357, 0)}
    singles = {claims for _, claims in evaluation_captions("single", 24, 0)}
    plain = [
        Claims(
            objects=tuple(ObjectClaim(shape=one.shape, colour=one.colour) for one in scene.objects),
            relations=scene.relations,
        )
        for _, _, scene in english
    ]
    assert not pairs & set(plain)
    assert not singles & {claims for _, claims, _ in english}
    assert len(set(plain)) > 800


@pytest.mark.parametrize("kind", ["", "triple"])
def test_an_unknown_kind_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="kind must be one of single, pair, open"):
        evaluation_captions(kind, 1, 0)


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="language must be one of en, zh, got 'fr'"):
        phrase(red_and_blue("above"), np.random.default_rng(0), "fr")
