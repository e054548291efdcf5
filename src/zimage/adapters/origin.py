"""What a LoRA file says of the model that it was trained for: another architecture, or the other variant.

Keys tell the architecture, metadata sometimes the variant too. Where neither tells, nothing is guessed. Knows texts
only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

ARCHITECTURE_KEYS = ("modelspec.architecture", "ss_base_model_version")
"""Where metadata names the architecture: Stability's model specification, and sd-scripts' own."""
MODEL_KEYS = (*ARCHITECTURE_KEYS, "ss_sd_model_name", "base_model", "base_model_name_or_path")
"""Where it names the model."""

_OWN = re.compile(r"z[-_ ]?image", re.IGNORECASE)
_FOREIGN = (
    ("Stable Diffusion XL", re.compile(r"sdxl|stable-diffusion-xl", re.IGNORECASE)),
    ("Stable Diffusion", re.compile(r"stable-diffusion|^sd_|^sd[123]", re.IGNORECASE)),
    ("Flux", re.compile(r"flux", re.IGNORECASE)),
    ("Qwen-Image", re.compile(r"qwen", re.IGNORECASE)),
    ("Wan", re.compile(r"\bwan", re.IGNORECASE)),
    ("HunyuanVideo", re.compile(r"hunyuan", re.IGNORECASE)),
    ("Lumina", re.compile(r"lumina", re.IGNORECASE)),
    ("Chroma", re.compile(r"chroma", re.IGNORECASE)),
    ("HiDream", re.compile(r"hidream", re.IGNORECASE)),
)
_KEYS = (
    ("Flux", re.compile(r"double_blocks|single_blocks|single_transformer_blocks")),
    (
        "Stable Diffusion XL",
        re.compile(r"lora_te2_|input_blocks_[78]_1|down_blocks_2_attentions_1"),
    ),
    ("Stable Diffusion", re.compile(r"input_blocks|output_blocks|down_blocks|up_blocks|mid_block")),
    ("Qwen-Image or Stable Diffusion 3", re.compile(r"transformer_blocks|joint_blocks")),
    ("Wan", re.compile(r"blocks[._]\d+[._](?:self_attn|cross_attn)")),
)
_TURBO, _UNTURBO = re.compile(r"turbo", re.IGNORECASE), re.compile(r"de-?_?turbo|un-?_?turbo", re.IGNORECASE)
_BASE = re.compile(r"z[-_ ]?image[-_: ]?base|(?:^|/)z-image/?$", re.IGNORECASE)


def foreign_architecture(metadata: Mapping[str, str]) -> str | None:
    """The other architecture that metadata names, `None` if it names none or this one."""
    for key in ARCHITECTURE_KEYS:
        value = metadata.get(key, "")
        if value and not _OWN.search(value):
            found = next((name for name, pattern in _FOREIGN if pattern.search(value)), None)
            if found:
                return found
    return None


def architecture_of_keys(keys: Iterable[str]) -> str | None:
    """The architecture whose layers keys are named after, where that is known."""
    joined = "\n".join(keys)
    return next((name for name, pattern in _KEYS if pattern.search(joined)), None)


def trained_variant(metadata: Mapping[str, str]) -> str | None:
    """ "turbo" or "base" where metadata tells, else `None`."""
    values = [metadata[key] for key in MODEL_KEYS if key in metadata]
    if any(_UNTURBO.search(value) for value in values):
        return None
    if any(_TURBO.search(value) for value in values):
        return "turbo"
    return "base" if any(_BASE.search(value) for value in values) else None
