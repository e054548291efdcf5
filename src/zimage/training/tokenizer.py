"""The tokenizer of the trained models: byte-level BPE learned from captions as they are generated.

Knows what captions look like and nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from ..checkpoint.bpe import train_tokenizer, write_tokenizer
from ..errors import CheckpointError
from ..models.text_encoder import TEMPLATE
from ..models.transformer import TOKEN_MULTIPLE
from .captions import CHINESE_WORDS, describe
from .config import ModelSize
from .scenes import draw_scene

CAPTIONS = 20_000


def make_tokenizer(size: ModelSize, folder: Path, *, seed: int = 0, captions: int = CAPTIONS) -> dict[str, int]:
    """Learn the tokenizer from so many captions of the stream `seed` and write it to `folder`, which must not be there.

    Returns the ids of special tokens for the text encoder's config.
    """
    texts = []
    for index in range(captions):
        rng = np.random.default_rng([seed, index])
        texts.append(TEMPLATE.replace("{prompt}", describe(draw_scene(rng), rng)[0]))
    tokenizer = train_tokenizer(texts, size.vocab_size - 256 - SPECIAL, CHINESE_WORDS)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_tokenizer(tokenizer, folder)


SPECIAL = 5
"""Tokens that are not learned: padding, the two marks of a turn, and the two of thinking."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that `make_tokenizer` wrote; `CheckpointError` if it is not there."""
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder / 'tokenizer.json'} is missing; run the stage `tokenizer` or `prepare` first")
    return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)


def tokens_of(tokenizer: Any, captions: Sequence[str]) -> list[list[int]]:
    """The ids of each caption in its chat template, as the pipeline tokenizes it."""
    texts = [TEMPLATE.replace("{prompt}", caption) for caption in captions]
    return [list(ids) for ids in tokenizer(texts, return_attention_mask=False)["input_ids"]]


def batch_of(ids: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Ids (B, padded), filled on the right with 0 to a multiple of 32, and the length of each."""
    lengths = [len(one) for one in ids]
    padded = -(-max(lengths) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    filled = torch.zeros(len(ids), padded, dtype=torch.long)
    for row, one in zip(filled, ids, strict=True):
        row[: len(one)] = torch.tensor(one)
    return filled, lengths
