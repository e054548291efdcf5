"""The main stage: it learns, resumes to the bit, draws what it should, and computes what the pipeline computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zimage import CheckpointError, NonFiniteError, RequestError, ZImagePipeline
from zimage.denoiser import Conditioning, Preparation, make_velocity
from zimage.request import GenerationRequest
from zimage.training.alignment import patch_facts
from zimage.training.config import FlowStage, ModelSize
from zimage.training.flow import Batches, draw_sigmas, flow_losses, train_flow
from zimage.training.latents import load_latents
from zimage.training.models import Painter, make_pipeline, plain_attention
from zimage.training.state import average_of, read_state
from zimage.training.tokenizer import batch_of, load_tokenizer, tokens_of
from zimage.variants import BASE

from .conftest import FLOW

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batches(data: Path) -> Batches:
    return Batches(FLOW, load_tokenizer(data / "tokenizer"), load_latents(data, 0), 0)


@pytest.fixture
def painter(size: ModelSize) -> Painter:
    """As it starts, but with an output that is not zero."""
    torch.manual_seed(1)
    painter = Painter(size)
    for name, weight in painter.transformer.named_parameters():
        if "adaLN" in name or "all_final_layer" in name:
            nn.init.normal_(weight, std=0.2)
    return painter


def test_a_few_steps_lower_the_loss(data: Path, size: ModelSize, tmp_path: Path) -> None:
    stage = replace(FLOW, steps=40, learning_rate=3e-3, batch=8, log_every=10)
    train_flow(stage, size, tmp_path, data=data, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert lines[0]["velocity"] == pytest.approx(2.0, abs=0.15)  # noise and latents of deviation 1, and an output of 0
    assert lines[-1]["velocity"] < 0.9 * lines[0]["velocity"]
    assert lines[-1]["alignment"] < lines[0]["alignment"]


def test_a_resumed_run_has_the_bits_of_one_that_went_through(data: Path, size: ModelSize, tmp_path: Path) -> None:
    train_flow(FLOW, size, tmp_path / "through", data=data, progress=False)
    train_flow(FLOW, size, tmp_path / "parts", data=data, progress=False, until=5)
    with pytest.raises(RequestError, match="holds a run already; go on with --resume"):
        train_flow(FLOW, size, tmp_path / "parts", data=data, progress=False)
    train_flow(FLOW, size, tmp_path / "parts", data=data, progress=False, resume=True)
    through, parts = (read_state(tmp_path / name)[0] for name in ("through", "parts"))
    assert through.keys() == parts.keys()
    assert all(torch.equal(through[name], parts[name]) for name in through)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("through", "parts")
    ]
    assert logs[0][-1]["loss"] == logs[1][-1]["loss"]
    assert logs[1][-1]["step"] == 12


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
    data: Path, size: ModelSize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = replace(FLOW, save_every=2)
    train_flow(stage, size, tmp_path, data=data, progress=False, until=2)
    real = Painter.velocity_and_facts
    monkeypatch.setattr(Painter, "velocity_and_facts", lambda *inputs: tuple(part / 0 for part in real(*inputs)))
    with pytest.raises(NonFiniteError, match="the last saved state is whole"):
        train_flow(stage, size, tmp_path, data=data, progress=False, resume=True)
    assert read_state(tmp_path)[1]["step"] == "2"
    assert all(tensor.isfinite().all() for tensor in read_state(tmp_path)[0].values())


def test_another_seed_is_another_run(data: Path, size: ModelSize, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has the scenes of seed 0, this run's is 1"):
        train_flow(FLOW, size, tmp_path, data=data, seed=1, progress=False)


def test_training_computes_what_the_pipeline_computes(painter: Painter, data: Path, batches: Batches) -> None:
    """The velocity of each member of a training batch, and the pipeline's at that noise level."""
    pipe = make_pipeline(painter, data / "tokenizer", data / "autoencoder" / "vae", variant="base", dtype=torch.float32)
    batch = batches.of(1)
    sigmas = batch.sigmas[:, None, None, None]
    noisy = (1 - sigmas) * batch.latents + sigmas * batch.noise
    with torch.no_grad():
        together, _ = painter.velocity_and_facts(noisy, batch.ids, batch.lengths, 1 - batch.sigmas)
        assert together.std() > 0.1
        for index, length in enumerate(batch.lengths):
            request = GenerationRequest(
                "x", seed=0, guidance_scale=0.0, sigmas=[1.0], height=64, width=64, any_size=True
            ).resolve(replace(BASE, shift=1.0))
            features = pipe.text_encoder.model(batch.ids[index : index + 1, :length]).last_hidden_state[0]
            preparation = Preparation(pipe.transformer)
            level = float(batch.sigmas[index])
            velocity = make_velocity(preparation, replace(request, sigmas=(level,)), Conditioning(features))
            alone = velocity(noisy[index : index + 1], float(torch.tensor(level)))
            torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=2e-4)


def test_attention_starts_so_that_it_can_learn(size: ModelSize) -> None:
    """Tokens that share something, queries that look for their like, words far apart; and an output of zero."""
    weights = dict(Painter(size).named_parameters())
    queries = [name for name in weights if "attention.to_q" in name]
    assert len(queries) == 3
    assert all(torch.equal(weights[name], weights[name.replace("to_q", "to_k")]) for name in queries)
    for name in ("all_x_embedder.2-1.bias", "cap_embedder.1.bias", "x_pad_token", "cap_pad_token"):
        assert weights[f"transformer.{name}"].std().item() == pytest.approx(1.0, abs=0.3)
    assert weights["text_encoder.embed_tokens.weight"].std().item() == pytest.approx(1.0, abs=0.05)
    assert not any(weight.any() for name, weight in weights.items() if "adaLN" in name or "final_layer" in name)


def test_all_parameters_learn(painter: Painter, batches: Batches) -> None:
    flow_losses(painter, batches.of(2), FLOW, CPU)["loss"].backward()
    still = [name for name, weight in painter.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == ["transformer.x_pad_token"]  # a square has 64 tokens and needs no pads
    painter.zero_grad()
    flow_losses(painter, batches.of(3), FLOW, CPU)["loss"].backward()
    assert painter.transformer.x_pad_token.grad is not None


def test_the_loss_is_that_of_the_velocity_and_of_what_is_read(
    painter: Painter, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batches.of(1)  # 12 × 20 latent pixels
    exact, facts = batch.noise - batch.latents, patch_facts(batch.scenes, 6, 10)
    stage = replace(FLOW, alignment=0.5)
    for beside, misread, loss in ((0, 0, 0.0), (2, 0, 4.0), (0, 4, 8.0), (2, 4, 12.0)):
        given = exact + beside, facts + misread
        monkeypatch.setattr(painter, "velocity_and_facts", lambda *_, given=given: given)
        losses = flow_losses(painter, batch, stage, CPU)
        assert losses["loss"] == pytest.approx(loss)
        assert losses["velocity"] == pytest.approx(beside**2)
        assert losses["alignment"] == pytest.approx(misread**2)


def test_what_a_step_sees_depends_on_its_number(batches: Batches) -> None:
    one, again, other = batches.of(6), batches.of(6), batches.of(8)
    for name in ("latents", "ids", "noise", "sigmas"):
        assert torch.equal(getattr(one, name), getattr(again, name))
        assert not torch.equal(getattr(one, name)[..., :4], getattr(other, name)[..., :4])
    assert [tuple(batches.of(step).latents.shape[2:]) for step in range(5)] == [
        (16, 16), (12, 20), (16, 16), (20, 12), (16, 16)
    ]  # fmt: skip


def test_captions_are_dropped_as_often_as_said(data: Path, batches: Batches) -> None:
    empty = tokens_of(batches.tokenizer, [""])[0]
    assert len(empty) < 10
    lengths = [length for step in range(1, 150) if step % 4 for length in batches.of(step).lengths]
    assert lengths.count(len(empty)) / len(lengths) == pytest.approx(FLOW.dropout, abs=0.05)


def test_some_captions_are_long(batches: Batches) -> None:
    for step in (4, 8):
        batch = batches.of(step)
        assert batch.ids.shape[1] == 64
        assert max(batch.lengths) > 32
    assert batches.of(5).ids.shape[1] == 32


def test_noise_levels_have_the_distribution_that_is_said() -> None:
    generator = torch.Generator().manual_seed(0)
    stage = FlowStage(shift=3.0, uniform=0.0)
    levels = draw_sigmas(stage, 100_000, generator)
    back = levels / (stage.shift - (stage.shift - 1) * levels)
    normal = torch.logit(back.double())
    assert normal.mean().item() == pytest.approx(0.0, abs=0.02)
    assert normal.std().item() == pytest.approx(1.0, abs=0.02)
    uniform = draw_sigmas(replace(stage, uniform=1.0), 100_000, generator)
    assert torch.histc(uniform, 10, 0, 1).div(10_000).sub(1).abs().max() < 0.05


def test_a_batch_of_captions_is_filled_up() -> None:
    ids, lengths = batch_of([[5, 6], list(range(1, 34))])
    assert ids.shape == (2, 64)
    assert lengths == [2, 33]
    assert ids[0].tolist() == [5, 6] + [0] * 62
    assert ids[1, :33].tolist() == list(range(1, 34))


def test_the_average_becomes_a_pipeline_that_saves_and_loads(data: Path, size: ModelSize, tmp_path: Path) -> None:
    train_flow(FLOW, size, tmp_path / "run", data=data, progress=False, until=2)
    painter = Painter(size)
    painter.load_state_dict(average_of(tmp_path / "run"))
    pipe = make_pipeline(painter, data / "tokenizer", data / "autoencoder" / "vae", variant="turbo")
    pipe.save_pretrained(tmp_path / "saved")
    loaded: Any = ZImagePipeline.from_pretrained(tmp_path / "saved", dtype="bfloat16", device="cpu")
    assert loaded.variant.name == "turbo"
    taken = Painter(size)
    taken.take(ZImagePipeline.from_pretrained(tmp_path / "saved", dtype="float32", device="cpu"))
    for name, weight in painter.named_parameters():
        if not name.startswith("reader."):  # which is no part of the model
            assert torch.equal(taken.get_parameter(name), weight.bfloat16().float())
    with pytest.raises(
        CheckpointError, match="the transformer to start from has other parts or sizes than the model to train"
    ):
        Painter(replace(size, n_layers=2)).take(loaded)
    options = {"seed": 3, "num_inference_steps": 2, "progress": False, "output_type": "latent"}
    latents = [one("a red circle", **options).images for one in (pipe, loaded)]
    assert latents[0].shape == (1, 16, 16, 16)  # of 128² pixels, as the VAE says
    assert torch.equal(*latents)


def test_plain_attention_is_attention(painter: Painter) -> None:
    assert painter.transformer.attend is plain_attention
    heads = [torch.randn(2, 7, 3, 8, requires_grad=True) for _ in range(3)]  # (B, N, heads, head_dim)
    plain = plain_attention(*heads)
    fused = nn.functional.scaled_dot_product_attention(*(one.transpose(1, 2) for one in heads)).transpose(1, 2)
    torch.testing.assert_close(plain, fused)
    weights = torch.randn_like(plain)
    gradients = [torch.autograd.grad(mixed, heads, weights) for mixed in (plain, fused)]
    torch.testing.assert_close(*gradients)


def test_an_exported_model_attends_as_any_other(painter: Painter, data: Path) -> None:
    pipe = make_pipeline(painter, data / "tokenizer", data / "autoencoder" / "vae", variant="base")
    assert "attend" not in vars(pipe.transformer)
    assert pipe.attention_backend == "native"
