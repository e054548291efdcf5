"""The first stage: an autoencoder of pictures, diffusers' AutoencoderKL in a small size.

Trained on an endless stream of scenes; afterwards its latents are measured, so that those that the transformer sees
have mean 0 and deviation 1. Knows nothing of captions or of diffusion.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from . import judge
from .config import LATENT_CHANNELS, LATENT_SCALE, AutoencoderStage, ModelSize
from .loop import Losses, run
from .models import half_precision
from .scenes import Example, Pixels, example
from .state import TrainingState, average_of, step_generator
from .world import CANVASES

FIGURES = "figures.json"
HELD_OUT = 1 << 20
"""Added to a seed: the stream that nothing is trained on."""
MEASURED = 512
"""Scenes that the scale of latents is measured on, and reconstructions that are judged."""


def build_autoencoder(size: ModelSize) -> Any:
    """The autoencoder with the weights that diffusers draws, in float32."""
    return AutoencoderKL(
        act_fn="silu",
        block_out_channels=size.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * len(size.vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(size.vae_channels),
        force_upcast=True,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=size.vae_layers,
        mid_block_add_attention=True,
        norm_num_groups=size.vae_groups,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_post_quant_conv=False,
        use_quant_conv=False,
    )


def examples_of(seed: int, start: int, count: int, canvas: tuple[int, int]) -> list[Example]:
    """`count` examples of the stream `seed` from number `start` on, all of one size."""
    return [example(seed, index, canvas=canvas) for index in range(start, start + count)]


def step_pictures(stage: AutoencoderStage, seed: int, step: int, canvas: tuple[int, int]) -> list[Pixels]:
    """What step 0, 1, … sees: crops, two of a scene, and in the end whole pictures."""
    if step >= stage.steps * (1.0 - stage.whole):
        count = max(1, stage.batch // 4)
        return [drawn.image for drawn in examples_of(seed, step * stage.batch, count, canvas)]
    count = -(-stage.batch // 2)
    rng = np.random.default_rng([seed, step, stage.crop])
    crops = [
        crop_around(drawn, stage.crop, rng)
        for drawn in examples_of(seed, step * stage.batch, count, canvas)
        for _ in range(2)
    ]
    return crops[: stage.batch]


def crop_around(drawn: Example, side: int, rng: np.random.Generator) -> Pixels:
    """A square of `side` pixels near one of the objects."""
    height, width = drawn.image.shape[:2]
    target = drawn.scene.objects[int(rng.integers(len(drawn.scene.objects)))]
    corner = []
    for centre, length in ((target.y, height), (target.x, width)):
        start = round(centre * length + float(rng.normal()) * side / 5 - side / 2)
        corner.append(min(max(start, 0), length - side) // LATENT_SCALE * LATENT_SCALE)
    top, left = corner
    return drawn.image[top : top + side, left : left + side]


def pixels_of(pictures: list[Pixels]) -> Tensor:
    """Pictures (H, W, 3) of one size as (B, 3, H, W) in [-1, 1]."""
    images = torch.from_numpy(np.stack(pictures))  # (B, H, W, 3)
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def train_autoencoder(
    stage: AutoencoderStage,
    size: ModelSize,
    folder: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    until: int | None = None,
    progress: bool = True,
) -> None:
    """Train, then write the averaged model to `folder/vae` with its latents' scale, and what was measured beside it.

    See `loop.run` for errors.
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = build_autoencoder(size).to(device)
    state = TrainingState.start(vae, stage)

    def losses(step: int) -> Losses:
        canvas = CANVASES[step % len(CANVASES)]
        pixels = pixels_of(step_pictures(stage, seed, step, canvas)).to(device)
        return autoencoder_losses(vae, pixels, stage, step_generator(seed, step, "posterior"))

    run(state, losses, stage, folder=folder, seed=seed, resume=resume, until=until, progress=progress)
    if state.step == stage.steps:
        figures = finish_autoencoder(size, folder, seed)
        (folder / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def autoencoder_losses(vae: Any, pixels: Tensor, stage: AutoencoderStage, generator: torch.Generator) -> Losses:
    """The loss of a batch of pixels (B, 3, H, W) and its parts; see `AutoencoderStage`."""
    with half_precision(pixels.device):
        mean, log_variance = vae.encoder(pixels).float().chunk(2, dim=1)  # (B, 16, H / 8, W / 8) each
        log_variance = log_variance.clamp(-30.0, 20.0)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        decoded = vae.decoder(mean + noise * (0.5 * log_variance).exp()).float()
    error = decoded - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    parts = {"absolute": error.abs().mean(), "squared": error.square().mean(), "edges": edges, "kl": kl}
    loss = sum((getattr(stage, name) * part for name, part in parts.items()), start=error.new_zeros(()))
    return {"loss": loss, **parts}


def finish_autoencoder(size: ModelSize, folder: Path, seed: int) -> dict[str, float]:
    """Write the averaged model of the state in `folder` to `folder/vae`, and return what was measured of it.

    `std` and `mean` are of unscaled latents, `error` is the mean absolute error in grey levels of 255, `legible` the
    share of reconstructions that the judge reads as captioned.
    """
    vae = build_autoencoder(size)
    vae.load_state_dict(average_of(folder))
    vae.eval().requires_grad_(False)
    figures = measure_autoencoder(vae, seed + HELD_OUT, MEASURED)
    vae.register_to_config(scaling_factor=round(1.0 / figures["std"], 4), shift_factor=round(figures["mean"], 4))
    vae.save_pretrained(folder / "vae")
    return figures


@dataclass
class _Sums:
    latents: list[Tensor]
    error: float = 0.0
    legible: int = 0


@torch.no_grad()
def measure_autoencoder(vae: Any, seed: int, count: int) -> dict[str, float]:
    """The figures of `finish_autoencoder` on `count` scenes of the stream `seed`."""
    sums = _Sums([])
    for start in range(0, count, 16):
        examples = examples_of(seed, start, 16, CANVASES[start // 16 % len(CANVASES)])
        pixels = pixels_of([drawn.image for drawn in examples])
        latents = vae.encoder(pixels).chunk(2, dim=1)[0]
        decoded = vae.decoder(latents).clamp(-1, 1)
        sums.latents.append(latents.permute(1, 0, 2, 3).flatten(1))  # (16, values)
        sums.error += float((decoded - pixels).abs().mean()) * 127.5 / (count / 16)
        images = decoded.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        sums.legible += sum(
            judge.agrees(judge.read(image), one.claims) for image, one in zip(images, examples, strict=True)
        )
    latents = torch.cat(sums.latents, dim=1)
    return {
        "mean": float(latents.mean()),
        "std": float(latents.std()),
        "error": sums.error,
        "legible": sums.legible / count,
    }
