"""Loads the components of a checkpoint folder: everything is checked before the first weight is read.

Five hard-coded classes come out, whatever the files say, and no code of a checkpoint runs. Knows nothing of the hub
(`locate` does), of variants or of where a pipeline will put the weights beyond one device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from ..errors import CheckpointError
from ..memory.plan import Plan
from ..memory.residency import Reader, streamed_names
from ..memory.ring import Field, Layer
from ..memory.sizes import ModelSizes
from ..models.quantized import quantize
from ..models.transformer import BLOCKS, ZImageTransformer
from ..own import OwnRecipe
from .configs import PARTS
from .reading import reason
from .sizes import sizes_of
from .streaming import layer_file, moves, streamed_layers
from .survey import Survey, survey
from .tensors import LayerFile, fill

Planner = Callable[[ModelSizes], Plan]


@dataclass(frozen=True, kw_only=True, eq=False)
class Components:
    """A Z-Image model in memory.

    `text_encoder` has no last layer and no final norm, for which an identity stands: Z-Image uses what enters the last
    layer, and its `last_hidden_state` is that. `text_encoder_layers` counts all layers of the original. `folder` is
    where it all came from, None where it was made in memory, but for the weights of components that had `files` for
    themselves.
    """

    tokenizer: Qwen2Tokenizer
    text_encoder: Qwen3Model
    text_encoder_layers: int
    transformer: ZImageTransformer
    vae: AutoencoderKL
    shift: float
    folder: Path | None
    own: OwnRecipe
    """What its checkpoint says that it is best drawn with."""
    files: Mapping[str, Path] = field(default_factory=dict)
    plan: Plan | None = None
    layers: tuple[Layer, ...] = ()
    """Those that pass through the device as the plan has it, in the order in which they run."""
    read: Reader | None = None
    """What reads a layer from the files again."""


def load_components(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    planner: Planner | None = None,
    files: Mapping[str, Path] | None = None,
    parts: Sequence[str] = PARTS,
) -> Components:
    """The components in `folder`, their weights in `dtype`, in evaluation mode and without gradients.

    Those that are not among `parts` are checked, but get no weights.

    Those that `files` has a file for are in that; layers that a file has in fewer bits stay so.
    All are on `device`, or where the plan has them that `planner` makes of their sizes before anything is read; layers
    that it streams are on the host, or still in their files.

    Raises `CheckpointError` for anything missing, damaged, foreign or hostile, and lists what is wrong: configs, the
    tokenizer and the names, shapes and types of all tensors are checked before a weight is read, and the values while
    they are. Host memory beyond the weights themselves: 32 MiB.
    """
    target = torch.device(device)
    try:
        found = survey(Path(folder), files)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {reason(error)}") from error
    found.require()
    return _load(found, dtype, target, None if planner is None else planner(sizes_of(found)), parts)


@torch.inference_mode(False)
def _load(
    found: Survey, dtype: torch.dtype, device: torch.device, plan: Plan | None, parts: Sequence[str]
) -> Components:
    configs = found.configs
    assert configs.text_encoder is not None  # the survey found no errors
    assert configs.shift is not None
    layers: list[Layer] = []
    if plan is not None and plan.placement.weights:
        quantize(found.blanks["text_encoder"].module, plan.placement.weights, "layers")
        activations = plan.placement.quantize_activations
        quantize(found.blanks["transformer"].module, plan.placement.weights, *BLOCKS, activations=activations)
    for component in parts:
        blank, weights = found.blanks[component], found.weights[component]
        streamed = streamed_names(plan.placement, component, blank.module) if plan else []
        is_apart = plan is not None and component == "text_encoder" and plan.placement.text_encoder != "resident"
        rest = {name: to for name, to in blank.targets.items() if not moves(to, streamed)}
        fill(blank.module, weights, rest, dtype=dtype, device=torch.device("cpu") if is_apart else device)
        if streamed:
            assert plan is not None
            source = plan.placement.text_source if component == "text_encoder" else plan.placement.block_source
            layers += streamed_layers(blank, weights, streamed, source=source, dtype=dtype, device=device)

    def read(component: str, name: str, fields: Sequence[Field]) -> LayerFile:
        return layer_file(found.blanks[component], found.weights[component], name, fields)

    return Components(
        tokenizer=found.tokenizer,
        text_encoder=found.blanks["text_encoder"].module,
        text_encoder_layers=configs.text_encoder["num_hidden_layers"],
        transformer=found.blanks["transformer"].module,
        vae=found.blanks["vae"].module,
        shift=configs.shift,
        folder=found.folder,
        own=configs.own,
        files=found.files,
        plan=plan,
        layers=tuple(layers),
        read=read,
    )
