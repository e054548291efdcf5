"""Corrections come back from their file as they were, and only for the run that they were gathered for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zimage import CheckpointError
from zimage.training.corrections import CORRECTIONS, Corrections, Ways, load_corrections


def ways(*captions: str) -> Ways:
    return Ways(list(captions), torch.randn(len(captions), 9, 16, 16, 16))


def test_they_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = Corrections(ways("a red circle", "红色"), ways("a ring"), rounds=2, drawn=30, wrong=8)
    written.save(tmp_path / "new", 3)
    read = load_corrections(tmp_path / "new", 3)
    assert (read.rounds, read.drawn, read.wrong) == (2, 30, 8)
    assert (read.changed.captions, read.kept.captions) == (["a red circle", "红色"], ["a ring"])
    assert torch.equal(read.changed.latents, written.changed.latents)
    assert torch.equal(read.kept.latents, written.kept.latents)


def test_none_or_those_of_another_seed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{CORRECTIONS} is missing; run the stage `gather` first"):
        load_corrections(tmp_path, 0)
    Corrections(ways("a"), ways("b")).save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="was gathered with seed 3, this run's is 4"):
        load_corrections(tmp_path, 4)


def test_ways_are_put_together_and_chosen_with_their_captions() -> None:
    first, second = ways("a", "b"), ways("c")
    both = first + second
    chosen = both[[2, 0]]
    assert chosen.captions == ["c", "a"]
    assert torch.equal(chosen.latents, torch.stack([second.latents[0], first.latents[0]]))
    assert (Ways.none() + second).captions == ["c"]
    assert torch.equal((Ways.none() + second).latents, second.latents)
