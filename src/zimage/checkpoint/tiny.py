"""A tiny decoder for previews, diffusers' `AutoencoderTiny`: its two files, here or on the hub.

As strict as with all weights: safetensors only, every tensor there and of its shape. Knows nothing of when it is used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import CheckpointError
from .fields import read_config
from .hub import Repository
from .reading import reason

TAEF1 = "madebyollin/taef1"
"""Decodes the latents of Flux's VAE, which the released models have."""
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


def load_tiny_decoder(
    source: str | os.PathLike[str], *, latent_channels: int, dtype: torch.dtype, device: torch.device, **settings: Any
) -> AutoencoderTiny:
    """The decoder in a folder or a repository on the hub; "taef1" is TAEF1's.

    `settings` are those of `Repository`. Raises `CheckpointError` for what cannot be found, read or used.
    """
    config_file, weights = _files(source, settings)
    config = read_config(config_file)
    if config.get("_class_name") != AutoencoderTiny.__name__:
        raise CheckpointError(f"{config_file} is of {config.get('_class_name')!r}; a preview needs an AutoencoderTiny")
    try:
        decoder = AutoencoderTiny.from_config(config).to(dtype)
        found = decoder.load_state_dict(load_file(weights), strict=False)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{weights} cannot be loaded: {reason(error)}; download it again") from error
    if found.missing_keys or found.unexpected_keys:
        names = ", ".join([*found.missing_keys, *found.unexpected_keys][:5])
        raise CheckpointError(f"{weights} does not have the tensors of {config_file}: {names}; download it again")
    if decoder.config.latent_channels != latent_channels:
        raise CheckpointError(
            f"{config_file} is for latents of {decoder.config.latent_channels} channels, this model's have "
            f"{latent_channels}; 'taef1' is made for the released models"
        )
    return decoder.to(device).requires_grad_(False).eval()


def _files(source: str | os.PathLike[str], settings: dict[str, Any]) -> tuple[Path, Path]:
    folder = Path(source).expanduser()
    if source == "taef1" or not folder.is_dir():
        hub_id = TAEF1 if source == "taef1" else str(source)
        if not isinstance(source, str) or hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
            raise CheckpointError(f"there is no folder {source}; give one with {CONFIG} and {WEIGHTS}, or 'taef1'")
        repository = Repository(hub_id, revision=None, **settings)
        otherwise = "so it is no AutoencoderTiny in diffusers' layout; check the id"
        return repository.require(CONFIG, otherwise), repository.require(WEIGHTS, otherwise)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; a decoder for previews has {CONFIG} and {WEIGHTS}")
    return folder / CONFIG, folder / WEIGHTS
