"""Stored latents are those of the scenes they are stored for, at the scale that the transformer learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from zimage import CheckpointError
from zimage.training.autoencoder import build_autoencoder, pixels_of
from zimage.training.config import ModelSize
from zimage.training.latents import caption_of, counts, load_latents, scene_of, store_latents
from zimage.training.models import half_precision
from zimage.training.scenes import render
from zimage.training.world import CANVASES


def test_half_of_the_scenes_are_square() -> None:
    assert counts(40_000) == (20_000, 10_000, 10_000)
    assert counts(7) == (5, 1, 1)


def test_latents_are_those_of_their_scenes(size: ModelSize, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_autoencoder(size).eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=2.0, shift_factor=0.5)
    store_latents(vae, tmp_path, 8, seed=3, progress=False)
    stored = load_latents(tmp_path, 3)
    assert [tuple(one.shape) for one in stored] == [(4, 16, 16, 16), (2, 16, 12, 20), (2, 16, 20, 12)]
    for canvas, latents in enumerate(stored):
        for index, one in enumerate(latents):
            scene = scene_of(3, canvas, index)
            assert (scene.width, scene.height) == CANVASES[canvas]
            with half_precision(torch.device("cpu")):  # as they are encoded
                mean = vae.encode(pixels_of([render(scene)])).latent_dist.mean[0].float()
            torch.testing.assert_close(one.float(), (mean - 0.5) * 2.0, rtol=0.05, atol=0.05)
    assert scene_of(3, 0, 0) != scene_of(4, 0, 0) != scene_of(4, 1, 0)


def test_latents_of_another_seed_or_none_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has the scenes of seed 0, this run's is 5"):
        load_latents(data, 5)
    with pytest.raises(CheckpointError, match="is missing; run the stage `latents` first"):
        load_latents(tmp_path, 0)


def test_captions_are_drawn_anew() -> None:
    scene = scene_of(0, 0, 1)
    assert len({caption_of(scene, np.random.default_rng(number)) for number in range(20)}) > 5
