"""The scripts of `benchmarks/`: each can be loaded, and those for a card and of predicted steps run at a small size.

What they measure is no matter of tests; that both sides did the same work is the scripts' own to check, and that they
do is checked here.
"""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
SMALL = ["--size", "tiny", "--device", "cpu", "--recipe-side", "64"]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_can_be_loaded_and_says_what_it_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(name, monkeypatch)
    with pytest.raises(SystemExit) as end:
        run(module, monkeypatch, "--help")
    assert end.value.code == 0
    assert "--" in capsys.readouterr().out


def test_the_recipe_of_a_card_is_the_same_work_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts are read by each, also by the two of ours that share an encoder which remembers them."""
    card = load("card", monkeypatch)
    monkeypatch.setattr(card, "KEPT_ROUNDS", 2)
    run(card, monkeypatch, *SMALL, "--cases", "recipe:2", "--output", tmp_path)
    (file,) = tmp_path.glob("recipe-tiny-*.json")
    result = json.loads(file.read_text())
    steps, work = result["steps"], result["work"]
    assert work["zimage"] == work["diffusers"] == {"evaluations": 2 * steps, "prompts": 2}
    assert work["balanced"]["prompts"] == 2
    assert 2 < work["balanced"]["evaluations"] < steps * 2
    assert result["cosine"] > 0.99
    assert {name: len(times) for name, times in result["times_s"].items()} == dict.fromkeys(work, 2)
    assert "balanced_ratio" in capsys.readouterr().out


def test_a_case_of_a_card_is_kept_with_enough_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = load("card", monkeypatch)
    with pytest.raises(SystemExit):
        run(card, monkeypatch, *SMALL, "--cases", "256:9", "--output", tmp_path)
    assert "needs 10 rounds or more" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(card, "KEPT_ROUNDS", 1)
    run(card, monkeypatch, *SMALL, "--cases", "256:1,base-256:1", "--output", tmp_path)
    names = sorted(json.loads(file.read_text())["model"]["variant"] for file in tmp_path.iterdir())
    assert names == ["base", "turbo"]


def test_ways_to_do_without_an_evaluation_are_compared_with_the_librarys_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the first is the library's, written out again, and its price the one that recipes tell."""
    caching = load("caching", monkeypatch)
    monkeypatch.setattr(caching, "SENTENCES", ("a fox",))
    monkeypatch.setattr(caching, "RANDOM", {**caching.GUIDED, "height": 64, "width": 64, "any_size": True})
    for name, options in (("ways", ["--methods"]), ("settings", [])):
        run(caching, monkeypatch, "--models", "tiny", "--dtype", "float32", *options, "--output", tmp_path / name)
    ways, settings = (
        {row["setting"]: row for row in json.loads(next((tmp_path / name).iterdir()).read_text())["tiny"]}
        for name in ("ways", "settings")
    )
    assert list(ways) == ["every step", *caching.METHODS]
    own, balanced = ways["the line through two results"], settings["cache=balanced"]
    assert own["distance"] == balanced["distance"] > 0
    assert own["evaluations"] == balanced["evaluations"]
    assert ways["every step"]["evaluations"] == 100
    assert len({row["distance"] for row in ways.values()}) == len(ways)
    costs = {name: row["evaluations"] for name, row in ways.items()}
    assert costs["guidance on the line"] == 50 + own["evaluations"] / 2
    assert own["evaluations"] < costs["the first block"] < 100


def test_an_unknown_case_and_one_that_fails_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = load("card", monkeypatch)
    with pytest.raises(SystemExit):
        run(card, monkeypatch, *SMALL, "--cases", "1023")
    assert "no case 1023; there are 1024, 512" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="failed: 256-graphs"):
        run(card, monkeypatch, *SMALL, "--cases", "256-graphs:1")
    assert "CUDA graphs need a CUDA device" in capsys.readouterr().err
