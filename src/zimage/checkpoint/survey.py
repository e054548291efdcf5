"""Every check of a checkpoint that needs no weights to be read; loading and inspecting both stand on it.

A survey goes on after a failed check, so that all that is wrong is found at once. Knows what has to fit together; how
each thing is read is the business of `configs`, `shards`, `modules` and `tokenizer`.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found in `folder`. `blanks` and `weights` lack the components that could not be read."""

    folder: Path
    configs: Configs
    tokenizer: Any
    blanks: dict[str, Blank]
    weights: dict[str, Weights]
    errors: tuple[CheckpointError, ...]

    def require(self) -> None:
        """Raise what was found wrong, in one `CheckpointError`."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            others = "; also: ".join(str(error) for error in self.errors[:3])
            more = f"; and {len(self.errors) - 3} more problems" if len(self.errors) > 3 else ""
            raise CheckpointError(f"{others}{more}") from self.errors[0]


def survey(folder: Path, transformer: Path | None = None) -> Survey:
    """Check the checkpoint in `folder`, its transformer's weights in a file of their own if `transformer` names one.

    Raises only where there is no such folder.
    """
    if not folder.is_dir():
        came = "is no folder" if folder.exists() else "is missing"
        raise CheckpointError(f"{folder} {came}; a checkpoint is a folder with model_index.json in it")
    problems = Problems()
    configs = read_configs(folder, problems)
    by_component = {"text_encoder": configs.text_encoder, "transformer": configs.transformer, "vae": configs.vae}
    blanks: dict[str, Blank] = {}
    weights: dict[str, Weights] = {}
    for component in PARTS:
        with problems.collected():
            weights[component] = read_component(folder, component, transformer)
        config = by_component[component]
        if config is None:
            continue
        with problems.collected():
            names = weights[component].entries if component in weights else ()
            blanks[component] = blank = build(component, config, names)
            if component in weights:
                match(folder / component, component, weights[component], blank.needed, blank.spare)
                if component == "transformer":
                    kinds = {blank.targets[name]: entry.dtype for name, entry in weights[component].entries.items()}
                    pack(blank.module, kinds, *BLOCKS)
    tokenizer = None
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
    )
