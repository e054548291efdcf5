"""The first stage: it learns, looks where objects are, and its latents are scaled as measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from zimage.training.autoencoder import crop_around, pixels_of, step_pictures, train_autoencoder
from zimage.training.config import AutoencoderStage, ModelSize
from zimage.training.scenes import PALETTE, example
from zimage.training.state import read_state
from zimage.training.world import CANVASES

STAGE = AutoencoderStage(steps=20, batch=4, learning_rate=4e-3, warmup=2, log_every=5, save_every=100, crop=32)


def test_a_few_steps_lower_the_loss(size: ModelSize, tmp_path: Path) -> None:
    stage = replace(STAGE, steps=80, learning_rate=1e-2)
    train_autoencoder(stage, size, tmp_path, progress=False, until=60)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_a_resumed_run_has_the_bits_of_one_that_went_through(size: ModelSize, tmp_path: Path) -> None:
    for name, until in (("through", 6), ("parts", 3)):
        train_autoencoder(STAGE, size, tmp_path / name, progress=False, until=until)
    train_autoencoder(STAGE, size, tmp_path / "parts", progress=False, resume=True, until=6)
    through, parts = (read_state(tmp_path / name)[0] for name in ("through", "parts"))
    assert all(torch.equal(through[name], parts[name]) for name in through)


def test_the_finished_autoencoder_has_latents_of_deviation_one(
    size: ModelSize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zimage.training.autoencoder.MEASURED", 96)
    train_autoencoder(replace(STAGE, steps=4), size, tmp_path, progress=False)
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.config.sample_size == 128
    pictures = [example(11, index).image for index in range(64)]
    with torch.no_grad():
        latents = vae.encode(pixels_of(pictures)).latent_dist.mean
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert scaled.mean().item() == pytest.approx(0.0, abs=0.1)
    assert scaled.std().item() == pytest.approx(1.0, abs=0.1)


def test_crops_show_an_object_and_whole_pictures_come_last() -> None:
    stage = replace(STAGE, batch=8, steps=10, whole=0.2)
    crops = step_pictures(stage, 0, 7, CANVASES[1])
    assert [crop.shape for crop in crops] == [(32, 32, 3)] * 8
    assert [one.shape for one in step_pictures(stage, 0, 8, CANVASES[1])] == [(96, 160, 3)] * 2
    again = step_pictures(stage, 0, 7, CANVASES[1])
    assert all(np.array_equal(*pair) for pair in zip(crops, again, strict=True))
    rng, shown = np.random.default_rng(0), 0
    for index in range(50):
        drawn = example(5, index)
        crop = crop_around(drawn, 64, rng)
        colours = [PALETTE[one.colour] for one in drawn.scene.objects]
        shown += any((crop == colour).all(axis=2).any() for colour in colours)
    assert shown == 50


def test_pixels() -> None:
    picture = np.zeros((2, 3, 3), dtype=np.uint8)
    picture[1, 2] = (255, 51, 0)
    pixels = pixels_of([picture])
    assert pixels.shape == (1, 3, 2, 3)
    assert pixels[0, :, 1, 2].tolist() == pytest.approx([1.0, -0.6, -1.0])
