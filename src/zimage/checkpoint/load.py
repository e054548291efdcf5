"""Loads the components of a checkpoint folder: everything is checked before the first weight is read.

Five hard-coded classes come out, whatever the files say, and no code of a checkpoint runs. Knows nothing of the hub
(`locate` does), of variants or of where a pipeline will put the weights beyond one device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from ..errors import CheckpointError
from ..models.transformer import ZImageTransformer
from .configs import PARTS
from .reading import reason
from .survey import Survey, survey
from .tensors import fill


@dataclass(frozen=True, kw_only=True, eq=False)
class Components:
    """A Z-Image model in memory.

    `text_encoder` has no last layer and no final norm, for which an identity stands: Z-Image uses what enters the last
    layer, and its `last_hidden_state` is that. `text_encoder_layers` counts all layers of the original. `folder` is
    where it all came from, None where it was made in memory.
    """

    tokenizer: Qwen2Tokenizer
    text_encoder: Qwen3Model
    text_encoder_layers: int
    transformer: ZImageTransformer
    vae: AutoencoderKL
    shift: float
    folder: Path | None


def load_components(
    folder: str | os.PathLike[str], *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Components:
    """The components in `folder`, their weights in `dtype` on `device`, in evaluation mode and without gradients.

    Raises `CheckpointError` for anything missing, damaged, foreign or hostile, and lists what is wrong: configs, the
    tokenizer and the names, shapes and types of all tensors are checked before a weight is read, and the values while
    they are. Host memory beyond the weights themselves: 32 MiB.
    """
    target = torch.device(device)
    try:
        found = survey(Path(folder))
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {reason(error)}") from error
    found.require()
    return _load(found, dtype, target)


@torch.inference_mode(False)
def _load(found: Survey, dtype: torch.dtype, device: torch.device) -> Components:
    configs = found.configs
    assert configs.text_encoder is not None  # the survey found no errors
    assert configs.shift is not None
    for component in PARTS:
        blank = found.blanks[component]
        fill(blank.module, found.weights[component], blank.targets, dtype=dtype, device=device)
    return Components(
        tokenizer=found.tokenizer,
        text_encoder=found.blanks["text_encoder"].module,
        text_encoder_layers=configs.text_encoder["num_hidden_layers"],
        transformer=found.blanks["transformer"].module,
        vae=found.blanks["vae"].module,
        shift=configs.shift,
        folder=found.folder,
    )
