"""Which prompts `zimage generate` draws, and that each picture has its own in its recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zimage import RequestError, read_recipe
from zimage.cli.prompts import prompts_of
from zimage.prompts import pick

NOTHING: dict[str, Any] = {"file": None, "expands": False, "number": None, "wildcards": None, "seed": None}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# two\na {red|blue} fox\n__animal__\n")
    return path


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "animal.txt").write_text("owl\ncat\n")
    return folder


def test_braces_are_letters_unless_asked(file: Path) -> None:
    assert prompts_of("a {red|blue} fox", **NOTHING) == ["a {red|blue} fox"]
    assert prompts_of(None, **{**NOTHING, "file": file}) == ["a {red|blue} fox", "__animal__"]


def test_all_or_some_of_each_line(file: Path, lists: Path) -> None:
    options = {**NOTHING, "file": file, "wildcards": lists}
    assert prompts_of(None, **{**options, "expands": True}) == ["a red fox", "a blue fox", "owl", "cat"]
    picked = prompts_of(None, **{**options, "number": 3, "seed": 5})
    assert picked[:3] == pick("a {red|blue} fox", 3, seed=5)
    assert picked[3:] == pick("__animal__", 3, seed=8, wildcards=lists)
    assert len({tuple(prompts_of(None, **{**options, "number": 20})) for _ in range(3)}) > 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"file": Path("a.txt")}, "a prompt and --prompts are both given; leave one out"),
        ({"expands": True, "number": 3}, "--expand draws all .* and --pick some; leave one out"),
        ({"wildcards": Path()}, "add --expand for all of them, or --pick 10 for some"),
        ({"number": 0}, "--pick must be a whole number from 1 to 10000, got 0"),
        ({"expands": True}, "at character 3 .*: a { is not closed"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        prompts_of("a {fox", **{**NOTHING, **options})


def test_no_more_than_a_command_can_draw(tmp_path: Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text("{0|1|2|3|4|5|6|7|8|9}{0|1|2|3|4|5|6|7|8|9}{0|1|2|3|4|5|6|7|8|9}\n" * 11)
    for options in ({"expands": True}, {"number": 1000, "seed": 1}):
        with pytest.raises(RequestError, match="there are more than 10000 prompts; one command draws no more"):
            prompts_of(None, **{**NOTHING, "file": file, **options})


def test_each_picture_has_its_own_prompt_in_its_recipe(zimage: Callable[..., Any], turbo: str) -> None:
    small = ("--size", "256", "--steps", "1", "--dtype", "float32", "--device", "cpu", "--quiet")
    ended = zimage("generate", "a {red|blue} fox", "--expand", "-m", turbo, "--seed", "7", *small)
    assert (ended.code, ended.out) == (0, "zimage-7.png\nzimage-8.png\n")
    prompts = [read_recipe(f"zimage-{seed}.png").request.prompt for seed in (7, 8)]
    assert prompts == ["a red fox", "a blue fox"]
    ended = zimage("generate", "a {red|blue fox", "--expand", "-m", turbo, *small)
    assert ended.code == 2
    assert "at character 3 of str 'a {red|blue fox': a { is not closed" in ended.err
