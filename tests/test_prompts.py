"""Templates of prompts: what they stand for, what is drawn at random, and what is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from zimage import RequestError
from zimage.prompts import MOST_PROMPTS, expand, parse, pick, read_prompts

LISTS = {"animal": ["fox", "{red|grey} squirrel"], "place": ["on __ground__", "at sea"], "ground": ["sand", "snow"]}


@pytest.mark.parametrize(
    ("template", "prompts"),
    [
        ("a fox", ["a fox"]),
        ("", [""]),
        ("a {red|blue} fox", ["a red fox", "a blue fox"]),
        ("{a|b} {1|2}", ["a 1", "a 2", "b 1", "b 2"]),
        ("a {|big }fox", ["a fox", "a big fox"]),
        ("{dark {red|blue}|grey}", ["dark red", "dark blue", "grey"]),
        ("{a|a|b}", ["a", "b"]),
        ("{a}", ["a"]),
        ("a | b", ["a | b"]),
        (r"\{a\|b\} {c\|d|e}", ["{a|b} c|d", "{a|b} e"]),
        (r"back\slash \\{a}", [r"back\slash \a"]),
        ("红{狐|猫}", ["红狐", "红猫"]),
        ("a __animal__", ["a fox", "a red squirrel", "a grey squirrel"]),
        ("__ground__ {and|or} __ground__", [f"{a} {how} {b}" for a in ("sand", "snow") for how in ("and", "or")
                                            for b in ("sand", "snow")]),
        ("__place__", ["on sand", "on snow", "at sea"]),
        (r"\__animal__ __init __ _x_", ["__animal__ __init __ _x_"]),
    ],
)  # fmt: skip
def test_what_a_template_stands_for(template: str, prompts: list[str]) -> None:
    assert expand(template, LISTS) == prompts
    assert set(pick(template, 100, seed=1, wildcards=LISTS)) == set(prompts)


def test_options_are_picked_as_often_as_the_others() -> None:
    counts = Counter(pick("{a|b|{c|d}}", 9000, seed=5))
    assert {text: round(count / 1500) for text, count in counts.items()} == {"a": 2, "b": 2, "c": 1, "d": 1}


def test_a_pick_depends_on_its_own_seed_alone() -> None:
    template = "{a|b|c|d} {1|2|3|4}"
    picked = pick(template, 20, seed=7)
    assert picked[3:] == pick(template, 17, seed=10)
    assert picked[:4] == ["b 1", "a 4", "b 2", "c 2"]  # on every machine and Python
    assert picked != pick(template, 20, seed=8)


def test_lists_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sea").mkdir()
    (tmp_path / "animal.txt").write_bytes(b"\xef\xbb\xbf# animals\r\nfox\r\n\r\n  __sea/fish__  \r\n")
    (tmp_path / "sea" / "fish.txt").write_text("cod\n鲤鱼\n", encoding="utf-8")
    assert expand("a __animal__", tmp_path) == ["a fox", "a cod", "a 鲤鱼"]
    with pytest.raises(RequestError, match=r"no list plant among those in .*: animal, sea/fish"):
        expand("a __plant__", str(tmp_path))
    with pytest.raises(RequestError, match="is no folder"):
        expand("a __plant__", tmp_path / "animal.txt")
    assert expand("a __../animal__", tmp_path / "sea") == ["a __../animal__"]  # no name


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("a {red fox", r"at character 3 of str 'a {red fox': a { is not closed; .* is written \\{ or \\}"),
        ("a {red|{blue} fox", "at character 3"),
        ("a red} fox", "at character 6 .*: a } closes no {"),
        ("{2$$a|b}", r"at character 2 .*numbers of options \(2\$\$\) and weights"),
        ("{a|3::b}", "at character 4"),
        ("{$$a|b}", "numbers of options"),
        ("__plant__", "no list plant among those given: animal, bad, circle, empty, ground, letters, place, round"),
        ("__empty__", "the list empty is empty"),
        ("__bad__", "in the list bad, at character 1 of str '{open': a { is not closed"),
        ("__circle__", "the list circle contains itself .circle > round > circle.; take that out"),
        ("__letters__", "the list letters must be a list of texts, got str 'abc'"),
        ("{" * 33 + "}" * 33, "more than 32 groups and lists are within one another; use fewer"),
        ("{0|1|2|3|4|5|6|7|8|9}" * 4 + "{a|b}", "stands for 20000 prompts, of which at most 10000 are made; take some"),
        (7, "a template must be a text, got int 7"),
    ],
)
def test_what_is_no_template(template: Any, said: str) -> None:
    more = {"empty": [], "bad": ["{open"], "circle": ["__round__"], "round": ["__circle__"], "letters": "abc"}
    with pytest.raises(RequestError, match=said):
        expand(template, {**LISTS, **more})


@pytest.mark.parametrize(
    ("wildcards", "said"),
    [
        (5, "wildcards must be lists by name, like .*, or a folder of text files; got int 5"),
        ([["fox"]], "wildcards must be lists by name"),
        ({"animal": 5}, "the list animal must be a list of texts, got int 5"),
        ({"animal": (one for one in ["fox"])}, "the list animal must be a list of texts, got generator"),
    ],
)
def test_what_are_no_lists(wildcards: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        expand("__animal__", wildcards)


def test_lists_are_named_where_none_are_given() -> None:
    with pytest.raises(RequestError, match=r"__animal__ names a list and none are given; pass wildcards \(--wildcards"):
        expand("__animal__")


def test_lists_within_lists_are_read_once() -> None:
    """Thirty lists that name the next one twice stand for more prompts than there is memory."""
    lists: dict[str, list[str]] = {f"a{number}": [f"__a{number + 1}____a{number + 1}__", ""] for number in range(30)}
    lists["a30"] = ["z"]
    with pytest.raises(RequestError, match="stands for prompts of more than 1048576 letters; make it shorter"):
        parse("__a0__", lists)
    with pytest.raises(RequestError, match="stands for 1000000000 or more prompts, of which at most 10000 are made"):
        expand("__a20__", lists)
    assert len(pick("__a20__", 3, seed=3, wildcards=lists)) == 3
    too_deep = {f"a{number}": [f"__a{number + 1}__"] for number in range(400)}
    with pytest.raises(RequestError, match="more than 32 groups and lists"):
        parse("__a0__", {**too_deep, "a400": ["z"]})
    with pytest.raises(RequestError, match="more than 32 groups and lists"):
        parse("".join(f"__a{number}__" for number in range(400, 0, -1)), {**too_deep, "a400": ["z"]})


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (MOST_PROMPTS + 1, 0), (1, -1), (2, 2**32 - 1), (True, 0)])
def test_counts_and_seeds_have_their_ranges(count: int, seed: int) -> None:
    with pytest.raises(RequestError, match="must be a whole number from"):
        pick("{a|b}", count, seed=seed)


def test_a_file_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# mine\r\na fox\r\n\r\n  一只猫 \r\n".encode())
    assert read_prompts(file) == ["a fox", "一只猫"]
    file.write_text("# nothing\n\n")
    with pytest.raises(RequestError, match="has no prompts: write one on each line"):
        read_prompts(str(file))
    file.write_bytes(b"a fox\n\xff\xfe")
    with pytest.raises(RequestError, match=r"is not UTF-8 text \(byte 7\); save it as UTF-8"):
        read_prompts(file)
    with pytest.raises(RequestError, match=r"cannot read .*: No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(RequestError, match=r"cannot read .*: Is a directory"):
        read_prompts(tmp_path)
    with pytest.raises(RequestError, match="path must be that of a text file of prompts, got NoneType None"):
        read_prompts(None)  # type: ignore[arg-type]


def test_a_file_that_is_no_list_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage.prompts.MOST_BYTES", 2**20)
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(RequestError, match="is larger than 1 MiB; take another file"):
        read_prompts(file)
