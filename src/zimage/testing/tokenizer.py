"""A small tokenizer that behaves as Qwen's: byte-level BPE with its pre-tokenizer, its special tokens and chat markup.

Trained on a few lines of English and Chinese that stand in this file, so that it needs no download and is the same
everywhere. It encodes any text and decodes it again (up to NFC). Knows nothing of models or checkpoints.
"""

from __future__ import annotations

import json
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

_MERGES = 440
_CORPUS = (
    "user system assistant a photo of a red fox sitting in the snow, soft morning light, shallow depth of field",
    "a portrait of an old woman with silver hair, oil painting, warm colours, detailed brush strokes",
    "a wide street in the rain at night, neon signs, reflections on the wet ground, people with umbrellas",
    "a small wooden house by the lake, mountains in the background, clear blue sky, the leaves are turning yellow",
    "a cat sleeping on a stack of books next to the window, dust in the sunlight",
    'a poster with the words "hello world" written in large green letters on white paper',
    "the red car is parked between the blue car and the white house; there are three trees behind them",
    "an astronaut riding a horse on the moon, cinematic, high detail, sharp focus, 35mm film, 1024 by 768 pixels",
    "a bowl of noodles with steam rising, seen from above, on a dark stone table",
    "blurry, low quality, deformed hands, watermark, text, cropped, out of frame",
    "It's what they've seen, and we'll say that she doesn't mind; I'm sure you'd like the other one more.",
    "this is for that which was from here and not there, with all of this over and under it",
    "一只红色的狐狸坐在雪地里，清晨柔和的光线，浅景深",
    "一位银发老妇人的肖像，油画，温暖的色彩，细腻的笔触",
    "夜晚雨中的宽阔街道，霓虹灯，湿润地面上的倒影，撑着雨伞的人们",
    "湖边的小木屋，背景是群山，晴朗的蓝天，树叶正在变黄",
    "一只猫睡在窗边的一摞书上，阳光里的灰尘",
    "一张海报，白纸上写着绿色的大字“你好，世界”",
    "红色的汽车停在蓝色的汽车和白色的房子之间；后面有三棵树",
    "宇航员在月球上骑马，电影感，高细节，清晰对焦",
)


def train_tokenizer() -> Tokenizer:
    """The tokenizer, trained anew: 256 bytes, about 440 merges, then the special tokens; the same each time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + _MERGES, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in OTHER_TOKENS])
    return tokenizer


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


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write `tokenizer.json`, `tokenizer_config.json`, `vocab.json` and `merges.txt` into `folder`, which is created.

    Returns the token ids that the text encoder's config names: `bos_token_id` and `eos_token_id`.
    """
    tokenizer = train_tokenizer()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    config = json.dumps(_tokenizer_config(tokenizer), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    ids = tokenizer.get_vocab()
    return {"bos_token_id": ids[PAD], "eos_token_id": ids[EOS]}
