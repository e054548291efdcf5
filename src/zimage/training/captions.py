"""What is said of a scene, in English and Chinese.

First it is decided what to claim of a scene, then those claims alone are put into words: so no caption says what its
claims do not. Also makes the captions that models are measured with. Knows nothing of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import TypeVar

import numpy as np

from .world import (
    BACKGROUNDS,
    COLOURS,
    CONTAINERS,
    CONTENTS,
    RELATIONS,
    SHAPES,
    SIZES,
    Claims,
    ObjectClaim,
    Scene,
    is_held_out_pair,
    is_held_out_single,
)

T = TypeVar("T")
LANGUAGES = ("en", "zh")
ENGLISH_SHARE = 0.6
BARE_SHARE = 0.1
"""Of captions that are one attribute or noun: such words are what negative prompts are made of."""


def describe(scene: Scene, rng: np.random.Generator, language: str | None = None) -> tuple[str, Claims]:
    """A caption of the scene and what it claims; without `language` English in 60 % of the draws, else Chinese."""
    language = language or draw_language(rng)
    if rng.random() < BARE_SHARE:
        claims = _bare(scene, rng)
    else:
        claims = (_of_one, _of_two, _of_three)[len(scene.objects) - 1](scene, rng)
    return phrase(claims, rng, language), claims


def draw_language(rng: np.random.Generator) -> str:
    """The language of a training caption, "en" or "zh"."""
    return "en" if rng.random() < ENGLISH_SHARE else "zh"


def phrase(claims: Claims, rng: np.random.Generator, language: str) -> str:
    """The claims in words, `language` "en" or "zh"; the wording and the order of words are drawn.

    Of several relations the first is said. Raises `ValueError` for another language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}")
    return (_english if language == "en" else _chinese)(claims, rng)


def evaluation_captions(kind: str, count: int, seed: int, language: str = "en") -> list[tuple[str, Claims]]:
    """`count` captions to measure a model with, and their claims.

    "single" names every attribute of one object, "pair" colours, shapes and the relation of two: both only in
    combinations held out from training (`world.is_held_out_single`, `world.is_held_out_pair`), though training shows
    all their parts in others. "open" names a shape, never a colour, so that pictures may differ. Every combination
    comes once, in an order drawn with `seed`, before one comes again. A shorter list is the beginning of a longer one,
    and makes the same claims in both languages.
    """
    kinds = {"single": _held_out_singles, "pair": _held_out_pairs, "open": _open_claims}
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}, got {kind!r}")
    claims, number = kinds[kind](), list(kinds).index(kind)
    rng = np.random.default_rng([seed, number])
    order: list[int] = []
    while len(order) < count:
        order.extend(rng.permutation(len(claims)).tolist())
    wordings = [np.random.default_rng([seed, number, place]) for place in range(count)]
    return [
        (phrase(claims[one], wording, language), claims[one]) for one, wording in zip(order, wordings, strict=False)
    ]


def _held_out_singles() -> list[Claims]:
    return [
        Claims(objects=(ObjectClaim(shape=shape, colour=colour, size=size),), background=background)
        for shape, colour, size, background in product(SHAPES, COLOURS, SIZES, BACKGROUNDS)
        if is_held_out_single(shape, colour, size, background)
    ]


def _held_out_pairs() -> list[Claims]:
    found = []
    for relation in RELATIONS:
        firsts, seconds = (CONTENTS, CONTAINERS) if relation == "inside" else (SHAPES, SHAPES)
        for first, second in product(product(firsts, COLOURS), product(seconds, COLOURS)):
            if first[1] != second[1] and is_held_out_pair(first, relation, second):
                objects = tuple(ObjectClaim(shape=shape, colour=colour) for shape, colour in (first, second))
                found.append(Claims(objects=objects, relations=((0, relation, 1),)))
    return found


def _open_claims() -> list[Claims]:
    return [
        Claims(objects=(ObjectClaim(shape=shape, size=size),), background=background)
        for shape, size, background in product(SHAPES, (None, *SIZES), (None, *BACKGROUNDS))
    ]


def _of_one(scene: Scene, rng: np.random.Generator) -> Claims:
    return Claims(objects=_named(scene, rng, size=0.5), background=_maybe(scene.background, rng, 0.5))


def _of_two(scene: Scene, rng: np.random.Generator) -> Claims:
    chance = rng.random()
    objects = _named(scene, rng, size=0.15, both=1.0 if chance < 0.65 else 0.5)
    relations = scene.relations if chance < 0.8 else ()
    return Claims(objects=objects, relations=relations, background=_maybe(scene.background, rng, 0.25))


def _of_three(scene: Scene, rng: np.random.Generator) -> Claims:
    objects = _named(scene, rng, size=0.1, both=0.85)
    told = scene.relations and rng.random() < 0.4
    relations = (_pick(scene.relations, rng),) if told else ()
    return Claims(objects=objects, relations=relations, background=_maybe(scene.background, rng, 0.15))


def _named(scene: Scene, rng: np.random.Generator, *, size: float, both: float = 0.75) -> tuple[ObjectClaim, ...]:
    """A claim of each object: colour and shape with the probability `both`, else one of them; `size` likewise."""
    claims = []
    for drawn in scene.objects:
        claim = ObjectClaim(shape=drawn.shape, colour=drawn.colour, size=_maybe(drawn.size, rng, size))
        if rng.random() >= both:
            claim = replace(claim, colour=None) if rng.random() < 0.6 else replace(claim, shape=None)
        claims.append(claim)
    return tuple(claims)


def _bare(scene: Scene, rng: np.random.Generator) -> Claims:
    drawn = _pick(scene.objects, rng)
    chance = rng.random()
    if chance < 0.2:
        return Claims(background=scene.background, exact=False)
    if chance < 0.55:
        return Claims(objects=(ObjectClaim(colour=drawn.colour),), exact=False)
    if chance < 0.85:
        return Claims(objects=(ObjectClaim(shape=drawn.shape),), exact=False)
    return Claims(objects=(ObjectClaim(size=drawn.size),), exact=False)


def _maybe(word: str, rng: np.random.Generator, probability: float) -> str | None:
    return word if rng.random() < probability else None


def _pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    return choices[int(rng.integers(len(choices)))]


ENGLISH_SIZES = {"small": ("small", "small", "little"), "large": ("large", "large", "big")}
ENGLISH_RELATIONS = {
    "left of": (
        "{a} left of {b}",
        "{a} to the left of {b}",
        "{a} on the left, {b} on the right",
        "{b} right of {a}",
        "{b} to the right of {a}",
    ),
    "above": ("{a} above {b}", "{b} below {a}", "{b} under {a}", "{a} at the top, {b} at the bottom"),
    "inside": ("{a} inside {b}", "{a} in {b}", "{b} with {a} inside", "{b} around {a}"),
}
ENGLISH_FRAMES = ("{}", "{}", "{}", "there is {}", "a picture of {}", "an image of {}")
ENGLISH_SCENES = (
    "{what} on a {ground} background",
    "{what}, {ground} background",
    "on a {ground} background, {what}",
)
ENGLISH_SINGLES = (*ENGLISH_SCENES, "{what} against a {ground} background", "{what} on {ground}")


def _english(claims: Claims, rng: np.random.Generator) -> str:
    if not claims.objects:
        return _pick(("a {} background", "{} background"), rng).format(claims.background)
    if not claims.exact:
        claim = claims.objects[0]
        return claim.shape or claim.colour or _pick(ENGLISH_SIZES[claim.size or ""], rng)
    terse = all(claim.colour for claim in claims.objects) and rng.random() < 0.2
    nouns = [_english_object(claim, rng, terse) for claim in claims.objects]
    text = _joined(nouns, claims, rng, ENGLISH_RELATIONS, _english_list, ", and ")
    if claims.background is not None:
        grounds = ENGLISH_SINGLES if len(nouns) == 1 else ENGLISH_SCENES
        text = _pick(grounds, rng).format(what=text, ground=claims.background)
    return text if terse or text.startswith("on ") else _pick(ENGLISH_FRAMES, rng).format(text)


def _english_object(claim: ObjectClaim, rng: np.random.Generator, terse: bool) -> str:
    """The object named, `terse` without an article; not for a shape alone, which would be a bare caption."""
    size = _pick(ENGLISH_SIZES[claim.size], rng) if claim.size else None
    if claim.shape is None and rng.random() < 0.4:
        return "something " + " and ".join(filter(None, (size, claim.colour)))
    noun = claim.shape or _pick(("shape", "thing"), rng)
    words = " ".join(filter(None, (size, claim.colour, noun)))
    if terse:
        return words
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _english_list(nouns: list[str], rng: np.random.Generator) -> str:
    joint = _pick((" and ", " and ", " with "), rng) if len(nouns) == 2 else " and "
    return joint.join([", ".join(nouns[:-1]), nouns[-1]])


CHINESE_COLOURS = dict(zip(COLOURS, ["红", "橙", "黄", "绿", "青", "蓝", "紫", "粉"], strict=True))
CHINESE_SHAPES = {
    "circle": ("圆形", "圆"),
    "square": ("正方形", "方块"),
    "triangle": ("三角形",),
    "star": ("五角星", "星形"),
    "ring": ("圆环",),
}
CHINESE_SIZES = {"small": "小", "large": "大"}
CHINESE_GROUNDS = {"white": "白", "grey": "灰", "black": "黑"}
CHINESE_RELATIONS = {
    "left of": ("{a}在{b}的左边", "{a}在{b}左边", "{b}在{a}的右边", "{b}的左边有{a}", "左边是{a}，右边是{b}"),
    "above": ("{a}在{b}的上面", "{a}在{b}上方", "{b}在{a}的下面", "{b}的上面有{a}", "上面是{a}，下面是{b}"),
    "inside": ("{a}在{b}里面", "{a}在{b}的里面", "{b}里面有{a}"),
}
CHINESE_PLACES = ("左边", "右边", "上面", "上方", "下面", "里面")
CHINESE_WORDS = (
    *(f"{word}色" for word in (*CHINESE_COLOURS.values(), *CHINESE_GROUNDS.values())),
    *(word for words in CHINESE_SHAPES.values() for word in words),
    *CHINESE_SIZES.values(),
    *CHINESE_PLACES,
    *("背景", "东西", "图形", "一个"),
)
"""The words that carry meaning, which nothing in writing sets apart; see `bpe.train_tokenizer`."""
CHINESE_FRAMES = ("{}", "{}", "{}", "一张图片，{}", "图中：{}")
CHINESE_SCENES = ("{what}，{ground}色背景", "{ground}色背景，{what}", "{ground}色背景上：{what}")
CHINESE_SINGLES = ("{ground}色背景上的{what}", "{ground}色背景上有{what}", "{what}，{ground}色背景")


def _chinese(claims: Claims, rng: np.random.Generator) -> str:
    ground = CHINESE_GROUNDS[claims.background] if claims.background else ""
    if not claims.objects:
        return f"{ground}色背景"
    if not claims.exact:
        claim = claims.objects[0]
        shape = _pick(CHINESE_SHAPES[claim.shape], rng) if claim.shape else ""
        return shape or (f"{CHINESE_COLOURS[claim.colour]}色" if claim.colour else CHINESE_SIZES[claim.size or ""])
    nouns = [_chinese_object(claim, rng) for claim in claims.objects]
    text = _joined(nouns, claims, rng, CHINESE_RELATIONS, _chinese_list, "，还有")
    if ground:
        text = _pick(CHINESE_SINGLES if len(nouns) == 1 else CHINESE_SCENES, rng).format(what=text, ground=ground)
    return _pick(CHINESE_FRAMES, rng).format(text)


def _chinese_object(claim: ObjectClaim, rng: np.random.Generator) -> str:
    colour = f"{CHINESE_COLOURS[claim.colour]}色" if claim.colour else ""
    size = CHINESE_SIZES[claim.size] if claim.size else ""
    noun = _pick(CHINESE_SHAPES[claim.shape], rng) if claim.shape else _pick(("东西", "图形"), rng)
    if colour and size:
        words = _pick((f"{colour}的{size}{noun}", f"{size}的{colour}{noun}"), rng)
    elif colour:
        words = _pick((f"{colour}的{noun}", f"{colour}{noun}"), rng)
    else:
        words = f"{size}{noun}"
    keeps_article = not (colour and claim.shape)  # one word alone would be a bare caption
    return f"一个{words}" if keeps_article or rng.random() < 0.7 else words


def _chinese_list(nouns: list[str], rng: np.random.Generator) -> str:
    joint = _pick(("和", "和", "，"), rng) if len(nouns) == 2 else "和"
    return joint.join(["、".join(nouns[:-1]), nouns[-1]])


def _joined(
    nouns: list[str],
    claims: Claims,
    rng: np.random.Generator,
    wordings: dict[str, tuple[str, ...]],
    listed: Callable[[list[str], np.random.Generator], str],
    rest: str,
) -> str:
    """The objects in one sentence, with the first relation that is claimed; without one in any order."""
    if not claims.relations:
        return listed([nouns[number] for number in rng.permutation(len(nouns))], rng) if len(nouns) > 1 else nouns[0]
    first, relation, second = claims.relations[0]
    text = _pick(wordings[relation], rng).format(a=nouns[first], b=nouns[second])
    others = [noun for number, noun in enumerate(nouns) if number not in (first, second)]
    return rest.join([text, *others])
