"""The state of a run: rates and averages by their formulas, and a file that is whole and of one run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from zimage import CheckpointError
from zimage.training.config import Stage
from zimage.training.state import STATE, TrainingState, average_of, ema_decay, learning_rate, step_generator

STAGE = Stage(steps=100, batch=1, learning_rate=0.1, warmup=10, decay=0.5, ema_decay=0.9)


def started(seed: int = 0) -> TrainingState:
    torch.manual_seed(seed)
    return TrainingState.start(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), STAGE)


def take_steps(state: TrainingState, count: int) -> None:
    for _ in range(count):
        inputs = torch.randn(5, 3, generator=step_generator(7, state.step, "inputs"))
        state.model(inputs).square().mean().backward()
        state.update(STAGE)


def weights(state: TrainingState) -> list[torch.Tensor]:
    return [weight.detach() for weight in state.model.parameters()]


@pytest.mark.parametrize(("step", "rate"), [(0, 0.01), (4, 0.05), (9, 0.1), (50, 0.1), (75, 0.05), (99, 0.002)])
def test_the_rate_rises_stays_and_falls(step: int, rate: float) -> None:
    assert learning_rate(STAGE, step) == pytest.approx(rate)


def test_the_average_forgets_the_start_quickly() -> None:
    assert [round(ema_decay(STAGE, step), 4) for step in (0, 8, 79, 80, 1000)] == [0.1, 0.5, 0.8989, 0.9, 0.9]


def test_the_average_is_that_of_the_weights() -> None:
    state = started()
    expected = [weight.clone() for weight in weights(state)]
    for step in range(5):
        take_steps(state, 1)
        kept = ema_decay(STAGE, step)
        expected = [kept * old + (1 - kept) * new for old, new in zip(expected, weights(state), strict=True)]
    for value, reference in zip(state.average.values(), expected, strict=True):
        torch.testing.assert_close(value, reference)


def test_a_saved_state_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    straight = started()
    take_steps(straight, 8)
    first = started()
    take_steps(first, 3)
    first.save(tmp_path, STAGE, 0)
    second = started(seed=1)
    second.load(tmp_path, STAGE, 0)
    assert second.step == 3
    take_steps(second, 5)
    assert all(torch.equal(*pair) for pair in zip(weights(straight), weights(second), strict=True))
    assert all(torch.equal(straight.average[name], second.average[name]) for name in straight.average)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    state = started()
    take_steps(state, 1)
    state.save(tmp_path, STAGE, 0)
    with pytest.raises(CheckpointError, match=r"is of another run: learning_rate was 0.1 and is 0.2"):
        started().load(tmp_path, replace(STAGE, learning_rate=0.2), 0)
    with pytest.raises(CheckpointError, match="seed was 0 and is 1"):
        started().load(tmp_path, STAGE, 1)
    started().load(tmp_path, replace(STAGE, steps=500, log_every=1), 0)
    with pytest.raises(CheckpointError, match="is missing; run that stage first"):
        average_of(tmp_path / "nowhere")


def test_a_state_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = started()
    take_steps(state, 1)
    state.save(tmp_path, STAGE, 0)
    before = (tmp_path / STATE).read_bytes()
    take_steps(state, 1)
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        state.save(tmp_path, STAGE, 0)
    assert (tmp_path / STATE).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [STATE]


def test_what_a_step_draws_depends_on_seed_step_and_purpose() -> None:
    draws = {
        key: tuple(torch.randn(4, generator=step_generator(*key)).tolist())
        for key in ((0, 0, "a"), (0, 1, "a"), (1, 0, "a"), (0, 0, "b"))
    }
    assert len(set(draws.values())) == 4
    assert tuple(torch.randn(4, generator=step_generator(0, 1, "a")).tolist()) == draws[0, 1, "a"]
