"""The learned tokenizer: short captions, the pipeline's ids, the same for a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zimage.models.text_encoder import TextEncoder
from zimage.training.captions import CHINESE_WORDS, describe
from zimage.training.config import ModelSize
from zimage.training.scenes import draw_scene
from zimage.training.tokenizer import load_tokenizer, make_tokenizer, tokens_of


def test_captions_are_short(data: Path) -> None:
    tokenizer, lengths = load_tokenizer(data / "tokenizer"), []
    for index in range(300):
        rng = np.random.default_rng([99, index])
        lengths.append(len(tokens_of(tokenizer, [describe(draw_scene(rng), rng)[0]])[0]))
    assert max(lengths) <= 40
    assert sum(lengths) / len(lengths) < 20


def test_a_chinese_word_is_a_token_of_its_own(tmp_path: Path) -> None:
    make_tokenizer(ModelSize(), tmp_path / "tokenizer", captions=2000)
    tokenizer, seen = load_tokenizer(tmp_path / "tokenizer"), set()
    for index in range(300):
        rng = np.random.default_rng([98, index])
        ids = tokens_of(tokenizer, [describe(draw_scene(rng), rng, "zh")[0]])[0]
        seen |= {tokenizer.decode([token]) for token in ids}
    assert set(CHINESE_WORDS) <= seen
    assert not [token for token in seen - set(CHINESE_WORDS) if any(word in token for word in CHINESE_WORDS)]


def test_ids_are_those_of_the_pipeline(data: Path) -> None:
    tokenizer = load_tokenizer(data / "tokenizer")
    encoder = TextEncoder.__new__(TextEncoder)
    encoder.tokenizer = tokenizer
    for text in ("a red circle", "一个蓝色的正方形", "", "something else entirely, é 🦊"):
        assert tuple(tokens_of(tokenizer, [text])[0]) == encoder.tokenize(text, 512).ids


def test_a_seed_gives_the_same_files(size: ModelSize, tmp_path: Path) -> None:
    for name in ("one", "other"):
        make_tokenizer(size, tmp_path / name, seed=4, captions=200)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()
