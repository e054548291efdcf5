"""The state of a run: rates and averages by their formulas, and a file that is whole and of one run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from zimage import CheckpointError, RequestError
from zimage.training.config import ModelSize, Stage
from zimage.training.models import Painter
from zimage.training.state import STATE, TrainingState, average_of, between, ema_decay, rate_factor, step_generator

STAGE = Stage(steps=100, batch=1, learning_rate=0.1, warmup=10, decay=0.5, ema_decay=0.9)
WITH_MUON = replace(STAGE, matrix_rate=0.2)


def started(seed: int = 0, stage: Stage = STAGE) -> TrainingState:
    torch.manual_seed(seed)
    return TrainingState.start(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), stage)


def take_steps(state: TrainingState, count: int, stage: Stage = STAGE) -> None:
    for _ in range(count):
        inputs = torch.randn(5, 3, generator=step_generator(7, state.step, "inputs"))
        state.model(inputs).square().mean().backward()
        state.update(stage)


def weights(state: TrainingState) -> list[torch.Tensor]:
    return [weight.detach() for weight in state.model.parameters()]


@pytest.mark.parametrize(("step", "factor"), [(0, 0.1), (4, 0.5), (9, 1.0), (50, 1.0), (75, 0.5), (99, 0.02)])
def test_the_rates_rise_stay_and_fall(step: int, factor: float) -> None:
    assert rate_factor(STAGE, step) == pytest.approx(factor)
    state = started(stage=WITH_MUON)
    state.step = step
    take_steps(state, 1, WITH_MUON)
    rates = [group["lr"] for optimiser in state.optimisers for group in optimiser.param_groups]
    assert rates == pytest.approx([0.1 * factor, 0.1 * factor, 0.2 * factor])


def test_muon_trains_what_is_between_the_first_and_the_last_layer(size: ModelSize) -> None:
    painter = Painter(size)
    names = {id(weight): name for name, weight in painter.named_parameters()}
    adam, muon = TrainingState.start(painter, WITH_MUON).optimisers
    assert isinstance(muon, torch.optim.Muon)
    by_muon = [names.pop(id(weight)) for weight in muon.param_groups[0]["params"]]
    assert all(re.search(r"_proj|to_(q|k|v|out)|w[123]|adaLN|reader", name) for name in by_muon)
    assert "transformer.layers.0.attention.to_q.weight" in by_muon
    assert "text_encoder.layers.0.mlp.up_proj.weight" in by_muon
    decayed, plain = ([names.pop(id(weight)) for weight in group["params"]] for group in adam.param_groups)
    assert not names
    assert sorted(decayed) == [
        "transformer.all_final_layer.2-1.adaLN_modulation.1.weight",
        "transformer.all_final_layer.2-1.linear.weight",
        "transformer.all_x_embedder.2-1.weight",
        "transformer.cap_embedder.1.weight",
        "transformer.t_embedder.mlp.0.weight",
        "transformer.t_embedder.mlp.2.weight",
    ]
    assert all(re.search(r"norm|bias|embed_tokens|pad_token|cap_embedder.0|reader.0", name) for name in plain)


def test_a_step_of_muon_has_the_size_that_is_said() -> None:
    torch.manual_seed(0)
    weight = nn.Linear(40, 30, bias=False)
    stage = replace(STAGE, matrix_rate=0.5, warmup=1, weight_decay=0.0)
    state = TrainingState.start(weight, stage)
    before = weight.weight.detach().clone()
    weight(torch.randn(64, 40)).square().mean().backward()
    state.update(stage)
    assert (weight.weight - before).square().mean().sqrt().item() == pytest.approx(0.1, rel=0.25)


def test_without_muon_the_training_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RequestError, match=r"needs torch 2\.9 or newer, for its Muon, and this is"):
        started(stage=WITH_MUON)
    take_steps(started(), 1)


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


@pytest.mark.parametrize("stage", [STAGE, WITH_MUON])
def test_a_saved_state_goes_on_with_the_same_bits(stage: Stage, tmp_path: Path) -> None:
    straight = started(stage=stage)
    take_steps(straight, 8, stage)
    first = started(stage=stage)
    take_steps(first, 3, stage)
    first.save(tmp_path, stage, 0)
    second = started(seed=1, stage=stage)
    second.load(tmp_path, stage, 0)
    assert second.step == 3
    take_steps(second, 5, stage)
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
    wider = TrainingState.start(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), STAGE)
    with pytest.raises(CheckpointError, match=r"state\.safetensors has other parts or sizes than the model to train"):
        wider.load(tmp_path, STAGE, 0)
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


def test_half_way_between_two_models() -> None:
    first = {"one": torch.tensor([0.0, 2.0]), "two": torch.tensor([4.0]).bfloat16()}
    second = {"one": torch.tensor([1.0, 2.0]), "two": torch.tensor([0.0])}
    made = between(first, second)
    assert {name: values.tolist() for name, values in made.items()} == {"one": [0.5, 2.0], "two": [2.0]}
    assert made["two"].dtype == torch.float32
    with pytest.raises(CheckpointError, match="the two models have other parts: three"):
        between(first, second | {"three": second["one"]})
