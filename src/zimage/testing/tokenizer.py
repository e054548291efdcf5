"""The small tokenizer of random checkpoints, trained on a few lines of English and Chinese that stand in this file.

So it needs no download and is the same everywhere. Knows nothing of models or checkpoints.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ..checkpoint import bpe

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
    return bpe.train_tokenizer(_CORPUS, _MERGES)


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write it into `folder`, which is created; returns the token ids that the text encoder's config names."""
    return bpe.write_tokenizer(train_tokenizer(), folder)
