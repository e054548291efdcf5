"""Makes a tokenizer that behaves as Qwen's: byte-level BPE with its pre-tokenizer, special tokens and chat markup.

Trained on the texts it is given, the same each time, and written as the hub's repositories have it. It encodes any text
and decodes it again (up to NFC). Knows nothing of models; reading a tokenizer is the business of `tokenizer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PAD, START, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, START, EOS)
OTHER_TOKENS = ("<think>", "</think>")

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pre-tokenizer, as in `transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX`."""

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- endif %}"
)


def train_tokenizer(texts: Iterable[str], merges: int, words: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer of 256 bytes, at most `merges` merges learned from `texts`, and the special tokens.

    No merge is learned from one of `words` into what stands beside it. Where a language is written without spaces they
    do what spaces do elsewhere: a word is one token and not a part of many. Of two that overlap the longer counts.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(words)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in OTHER_TOKENS])
    return tokenizer


def _pre_tokenizer(words: Sequence[str] = ()) -> pre_tokenizers.PreTokenizer:
    """Qwen's, which also cuts out `words`: that is for learning only, no file of ours asks for it."""
    cut = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    patterns = [SPLIT, cut] if words else [SPLIT]
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in SPECIAL_TOKENS + OTHER_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [START, EOS],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": PAD,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, int]:
    """Write `tokenizer.json`, `tokenizer_config.json`, `vocab.json` and `merges.txt` into `folder`, which is created.

    Returns the token ids that the text encoder's config names: `bos_token_id` and `eos_token_id`.
    """
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    config = json.dumps(_tokenizer_config(tokenizer), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    ids = tokenizer.get_vocab()
    return {"bos_token_id": ids[PAD], "eos_token_id": ids[EOS]}
