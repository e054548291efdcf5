"""A model small enough to train in a test: a tokenizer, an autoencoder's latents, one layer of each kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage.training import models
from zimage.training.autoencoder import build_autoencoder
from zimage.training.config import FlowStage, ModelSize
from zimage.training.latents import LATENTS, counts
from zimage.training.tokenizer import make_tokenizer
from zimage.training.world import CANVASES

SIZE = ModelSize(dim=64, n_heads=2, n_layers=1, hidden_size=32, intermediate_size=64, text_layers=1, vocab_size=512)
FLOW = FlowStage(steps=12, batch=4, scenes=16, warmup=2, log_every=3, save_every=100, long_every=4)


@pytest.fixture(scope="session")
def size() -> ModelSize:
    return replace(SIZE, vae_channels=(8, 8, 8, 8))


@pytest.fixture(scope="session")
def data(size: ModelSize, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training after its first stages; the latents are noise."""
    folder = tmp_path_factory.mktemp("training")
    make_tokenizer(size, folder / "tokenizer", captions=500)
    torch.manual_seed(0)
    vae = build_autoencoder(size)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    vae.save_pretrained(folder / "autoencoder" / "vae")
    generator = torch.Generator().manual_seed(0)
    shapes = [(count, 16, height // 8, width // 8) for count, (width, height) in zip(counts(16), CANVASES, strict=True)]
    latents = {str(canvas): torch.randn(shape, generator=generator) for canvas, shape in enumerate(shapes)}
    save_file({name: one.bfloat16() for name, one in latents.items()}, folder / LATENTS, metadata={"seed": "0"})
    return folder


def compute_in_float32(patch: pytest.MonkeyPatch) -> None:
    """Nothing is rounded to bfloat16, whatever the machine computes in."""
    patch.setattr(models, "choose_dtype", lambda *_: torch.float32)


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in_float32(monkeypatch)
