"""How often a model draws what it is told, as the judge reads it.

Pictures are made many at a time with the library's own sampler, guidance and noise, so a picture here is the pipeline's
of the same seed up to rounding. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.autoencoder import to_image
from ..models.transformer import TOKEN_MULTIPLE
from ..sampling.guidance import guide, is_guided
from ..sampling.noise import seeded_noise
from ..sampling.samplers import SAMPLERS, sample
from ..sampling.schedule import model_timesteps, shifted_sigmas
from . import judge
from .captions import evaluation_captions
from .config import LATENT_CHANNELS, LATENT_SCALE
from .scenes import Pixels
from .tokenizer import batch_of, tokens_of
from .world import CANVASES, Claims

KINDS = ("single", "pair")
LANGUAGES = ("en", "zh")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How pictures are made; `guidance_scale` and the two after it as in a request."""

    steps: int
    shift: float
    sampler: str = "euler"
    guidance_scale: float = 0.0
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    negative_prompt: str = ""
    canvas: tuple[int, int] = CANVASES[0]
    batch: int = 50

    @classmethod
    def of(cls, pipe: Any, **changes: Any) -> Recipe:
        """What the model of `pipe` is drawn with, but for the `changes`."""
        variant = pipe.variant
        own = {"sampler": variant.sampler, "guidance_scale": variant.guidance_scale}
        return cls(**{"steps": variant.num_inference_steps, "shift": pipe.shift, **own, **changes})


@torch.no_grad()
def draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], recipe: Recipe) -> list[Pixels]:
    """A picture (H, W, 3) of each prompt from its seed, by the models of the pipeline `pipe`."""
    pictures: dict[int, Pixels] = {}
    ids = tokens_of(pipe.text_encoder.tokenizer, prompts)
    for numbers in _batches(ids, recipe.batch):
        latents = _sample(pipe, [ids[number] for number in numbers], [seeds[number] for number in numbers], recipe)
        for number, one in zip(numbers, latents, strict=True):
            pictures[number] = np.asarray(to_image(pipe.autoencoder.decode(one[None])))
    return [pictures[number] for number in range(len(prompts))]


def adherence(pipe: Any, captions: Sequence[tuple[str, Claims]], seed: int, recipe: Recipe) -> float:
    """The share of `captions` whose picture agrees with all that is claimed; picture k has the seed `seed + k`."""
    seeds = range(seed, seed + len(captions))
    pictures = draw(pipe, [text for text, _ in captions], seeds, recipe)
    pairs = zip(pictures, captions, strict=True)
    return sum(judge.agrees(judge.read(picture), claims) for picture, (_, claims) in pairs) / len(captions)


def evaluate(pipe: Any, count: int, seed: int, recipe: Recipe) -> dict[str, float]:
    """Adherence over `count` held-out captions of each kind in each language."""
    return {
        f"{kind} {language}": adherence(pipe, evaluation_captions(kind, count, seed, language), seed, recipe)
        for kind in KINDS
        for language in LANGUAGES
    }


def _batches(ids: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Numbers of prompts whose tokens are filled up to the same length."""
    by_length: dict[int, list[int]] = {}
    for number, one in enumerate(ids):
        by_length.setdefault(-(-len(one) // TOKEN_MULTIPLE), []).append(number)
    for numbers in by_length.values():
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def _sample(pipe: Any, ids: list[list[int]], seeds: list[int], recipe: Recipe) -> Tensor:
    width, height = (side // LATENT_SCALE for side in recipe.canvas)
    latents = torch.stack([seeded_noise(seed, (LATENT_CHANNELS, height, width)) for seed in seeds])
    transformer = pipe.transformer
    levels = shifted_sigmas(recipe.steps, recipe.shift)
    times = model_timesteps(levels)
    modulations = dict(zip(levels.tolist(), transformer.modulations(times[:-1]), strict=False))
    time_of = dict(zip(levels.tolist(), times.tolist(), strict=True))
    positive = _caption(pipe, ids)
    negative = _caption(pipe, tokens_of(pipe.text_encoder.tokenizer, [recipe.negative_prompt]))

    def velocity(noisy: Tensor, sigma: float) -> Tensor:
        grid = transformer.grid(height, width, positive.length)
        prediction = transformer.denoise(noisy, positive, grid, modulations[sigma])
        if not is_guided(time_of[sigma], recipe.guidance_scale, recipe.cfg_truncation):
            return -prediction.float()
        grid = transformer.grid(height, width, negative.length)
        other = transformer.denoise(noisy, negative, grid, modulations[sigma])
        return -guide(prediction, other, recipe.guidance_scale, recipe.cfg_normalization)

    for step in sample(SAMPLERS[recipe.sampler], velocity, latents, levels.tolist()):
        latents = step.latents
    return latents


def _caption(pipe: Any, ids: list[list[int]]) -> Any:
    filled, lengths = batch_of(ids)
    features = pipe.text_encoder.model(input_ids=filled, use_cache=False).last_hidden_state
    return pipe.transformer.encode_captions(features, lengths)
