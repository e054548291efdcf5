"""Pictures for measuring are the pipeline's, and adherence is the judge's share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zimage.training import evaluate
from zimage.training.captions import evaluation_captions
from zimage.training.config import ModelSize
from zimage.training.evaluate import Recipe, adherence, draw
from zimage.training.models import Painter, make_pipeline
from zimage.training.scenes import example


@pytest.fixture(scope="module")
def pipe(data: Path, size: ModelSize) -> Any:
    torch.manual_seed(0)
    painter = Painter(size)
    for name, weight in painter.transformer.named_parameters():
        if "adaLN" in name or "all_final_layer" in name:
            nn.init.normal_(weight, std=0.2)
    return make_pipeline(painter, data / "tokenizer", data / "autoencoder" / "vae", variant="base", dtype=torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 3.0, "negative_prompt": "red"},
        {"guidance_scale": 3.0, "cfg_truncation": 0.5, "cfg_normalization": 1.0},
        {"canvas": (160, 96)},
    ],
)
def test_pictures_are_those_of_the_pipeline(pipe: Any, options: dict[str, Any]) -> None:
    prompts = ["a red circle", "一个蓝色的正方形", "a green star. " * 10]
    recipe = Recipe(steps=3, shift=6.0, batch=2, **options)
    drawn = draw(pipe, prompts, [5, 6, 7], recipe)
    width, height = recipe.canvas
    call = {name: value for name, value in options.items() if name != "canvas"}
    call |= {"guidance_scale": recipe.guidance_scale, "num_inference_steps": 3, "width": width, "height": height}
    images = [pipe(text, seed=5 + k, progress=False, **call).images[0] for k, text in enumerate(prompts)]
    for picture, image in zip(drawn, images, strict=True):
        assert picture.shape == (height, width, 3)
        assert np.abs(picture.astype(int) - np.asarray(image).astype(int)).max() <= 1


def test_adherence_is_the_share_that_the_judge_accepts(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [example(3, index, objects=1, language="en") for index in range(4)]
    pictures = [one.image for one in examples]
    pictures[2] = np.full_like(pictures[2], 255)
    monkeypatch.setattr(evaluate, "draw", lambda *_: pictures)
    captions = [(one.caption, one.claims) for one in examples]
    assert adherence(pipe, captions, 0, Recipe(steps=1, shift=6.0)) == 0.75


def test_every_kind_is_asked_in_both_languages(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def count(pipe: Any, captions: Any, seed: int, recipe: Recipe) -> float:
        asked.extend(text for text, _ in captions)
        return 0.5

    monkeypatch.setattr(evaluate, "adherence", count)
    figures = evaluate.evaluate(pipe, 3, 9, Recipe(steps=1, shift=6.0))
    assert list(figures) == ["single en", "single zh", "pair en", "pair zh"]
    assert asked == [
        text
        for kind in ("single", "pair")
        for language in ("en", "zh")
        for text, _ in evaluation_captions(kind, 3, 9, language)
    ]
