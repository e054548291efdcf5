"""Models without values, of any size, for arithmetic about memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from zimage.checkpoint.modules import Blank, build
from zimage.testing.configs import SIZES, text_encoder_config, transformer_config, vae_config


@cache
def blanks_of(name: str) -> dict[str, Blank]:
    """The three models of a size of `zimage.testing`, on the meta device: shapes and no memory."""
    size = SIZES[name]
    configs = {
        "text_encoder": text_encoder_config(size, "bfloat16", bos_token_id=0, eos_token_id=1),
        "transformer": transformer_config(size, "0.36.0"),
        "vae": vae_config(size, "0.36.0"),
    }
    foreign = ("architectures", "torch_dtype", "transformers_version")
    return {name: build(name, _known(config, foreign), ()) for name, config in configs.items()}


def _known(config: dict[str, Any], foreign: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in foreign}


@pytest.fixture
def blanks() -> Callable[[str], dict[str, Blank]]:
    return blanks_of
