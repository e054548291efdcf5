"""Every check of a checkpoint that needs no weights to be read; loading and inspecting both stand on it.

A survey goes on after a failed check, so that all that is wrong is found at once. Knows what has to fit together; how
each thing is read is the business of `configs`, `shards`, `modules` and `tokenizer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..models.quantized import pack
from ..models.transformer import BLOCKS
from .configs import PARTS, Configs, Problems, read_configs
from .modules import Blank, build
from .shards import Weights, match
from .single import read_component
from .tokenizer import load_tokenizer

_LAYERS = {"text_encoder": ("layers",), "transformer": BLOCKS}
"""The lists of blocks whose matrices stay in fewer bits."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found in `folder` and in the `files` that components have for themselves.

    `blanks` and `weights` lack the components that could not be read.
    """

    folder: Path
    configs: Configs
    tokenizer: Any
    blanks: dict[str, Blank]
    weights: dict[str, Weights]
    errors: tuple[CheckpointError, ...]
    files: Mapping[str, Path] = field(default_factory=dict)

    def require(self) -> None:
        """Raise what was found wrong, in one `CheckpointError`."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            others = "; also: ".join(str(error) for error in self.errors[:3])
            more = f"; and {len(self.errors) - 3} more problems" if len(self.errors) > 3 else ""
            raise CheckpointError(f"{others}{more}") from self.errors[0]


def survey(folder: Path, files: Mapping[str, Path] | None = None, parts: Sequence[str] = PARTS) -> Survey:
    """Check the checkpoint in `folder`, with the weights of components in files of their own as `files` names them.

    Weights are looked for of `parts`, and the tokenizer where those are all. Raises only where there is no such folder.
    """
    files = files or {}
    if not folder.is_dir():
        came = "is no folder" if folder.exists() else "is missing"
        raise CheckpointError(f"{folder} {came}; a checkpoint is a folder with model_index.json in it")
    problems = Problems()
    configs = read_configs(folder, problems)
    by_component = {"text_encoder": configs.text_encoder, "transformer": configs.transformer, "vae": configs.vae}
    blanks: dict[str, Blank] = {}
    weights: dict[str, Weights] = {}
    for component in parts:
        with problems.collected():
            weights[component] = read_component(folder, component, files)
        config = by_component[component]
        if config is None:
            continue
        with problems.collected():
            names = weights[component].entries if component in weights else ()
            blanks[component] = blank = build(component, config, names)
            if component in weights:
                _match(component, config, blank, weights[component], files.get(component, folder / component / "_"))
    tokenizer = None
    if set(parts) == set(PARTS):
        with problems.collected():
            size = configs.text_encoder["vocab_size"] if configs.text_encoder else 1 << 20
            tokenizer = load_tokenizer(folder / "tokenizer", size)
    return Survey(
        folder=folder,
        configs=configs,
        tokenizer=tokenizer,
        blanks=blanks,
        weights=weights,
        errors=tuple(problems.errors),
        files=files,
    )


def _match(component: str, config: Mapping[str, Any], blank: Blank, weights: Weights, file: Path) -> None:
    """Raise `CheckpointError` if the tensors are not those of `blank`; else its layers keep what they have in fewer
    bits."""
    first = weights.entries.get("decoder.conv_in.weight")
    if component == "vae" and first and len(first.shape) == 4 and first.shape[1] != config["latent_channels"]:
        raise CheckpointError(
            f"the VAE in {weights.headers[0].path} has {first.shape[1]} latent channels and the model has "
            f"{config['latent_channels']}; take that of Z-Image, which is Flux's (ae.safetensors)"
        )
    match(file.parent, component, weights, blank.needed, blank.spare)
    kinds = {to: weights.entries[name].dtype for name, to in blank.targets.items()}
    if component in _LAYERS:
        pack(blank.module, kinds, *_LAYERS[component])
