"""Which steps are evaluated where others are predicted: the schedule, what is refused, and what a run then does."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage import GenerationRequest, RequestError, ZImagePipeline, read_recipe
from zimage.caching import noise_levels
from zimage.sampling.schedule import shifted_sigmas
from zimage.variants import BASE, TURBO, Variant

CountForwards = Callable[[ZImagePipeline], AbstractContextManager[Counter[str]]]
BALANCED = (0, 1, 2, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 30, 33, 36, 39, 42, 46, 49)
"""Of the base model's recipe: a change of it is a change of every picture."""


def cached(**options: Any) -> tuple[int, ...]:
    return GenerationRequest("a fox", **{"cache": "balanced", **options}).resolve(BASE).cache


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_the_schedule_of_the_recipe(sampler: str) -> None:
    assert cached(sampler=sampler) == BALANCED
    assert GenerationRequest("a fox").resolve(BASE).cache == ()


@pytest.mark.parametrize("steps", [6, 10, 28, 30, 75, 100, 1000])
def test_the_first_and_last_steps_are_evaluated_and_early_ones_more_often(steps: int) -> None:
    schedule = cached(num_inference_steps=steps)
    levels = noise_levels(steps, 6.0, ())
    assert schedule[:4] == (0, 1, 2, 3)
    assert schedule[-1] == steps - 1
    assert all(
        later - earlier <= 1 + (1 if levels[earlier] >= 0.85 else 2 if levels[earlier] >= 0.6 else 3)
        for earlier, later in pairwise(schedule)
    )
    assert 2 * len(schedule) <= steps + 6


@pytest.mark.parametrize(("steps", "shift", "sigmas"), [(50, 6.0, ()), (8, 3.0, ()), (3, 6.0, (0.9, 0.5, 0.1))])
def test_noise_levels_are_those_of_the_schedule(steps: int, shift: float, sigmas: tuple[float, ...]) -> None:
    assert noise_levels(steps, shift, sigmas) == pytest.approx(shifted_sigmas(steps, shift, sigmas)[:-1].tolist())


@pytest.mark.parametrize("truncation", [0.0, 0.05, 0.2, 0.5, 0.75])
def test_where_guidance_ends_no_step_is_predicted_from_guided_ones(truncation: float) -> None:
    levels = noise_levels(50, 6.0, ())
    end = next(index for index, level in enumerate(levels) if 1 - level > truncation)
    assert {end, end + 1} <= set(cached(cfg_truncation=truncation))
    without = [step for step in range(50) if step != end + 1]
    if end > 0:
        with pytest.raises(RequestError, match=f"cache must have the steps {end + 1}:"):
            cached(cache=without, cfg_truncation=truncation)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (TURBO, {}, "cache has no use on Z-Image-Turbo.*leave it out, or use the base model"),
        (BASE, {"sampler": "heun"}, r"one evaluation \(euler and dpmpp_2m\), got sampler='heun'; pass sampler='euler'"),
        (replace(BASE, sampler="heun"), {}, "got 'heun', the model's own; pass sampler='euler'"),
        (BASE, {"num_inference_steps": 5}, "cache skips none of 5 steps; leave it out, or take more steps"),
        (BASE, {"num_inference_steps": 1}, "cache skips none of 1 steps"),
        (BASE, {"cache": "fast"}, "cache must be 'balanced' or a list of steps, got 'fast'"),
        (BASE, {"cache": 3}, "cache must be 'balanced' or a list of steps, got int 3"),
        (BASE, {"cache": True}, "cache must be 'balanced' or a list of steps, got bool True"),
        (BASE, {"cache": [0, 1, 50]}, "each step of cache must be a whole number from 0 to 49, got 50"),
        (BASE, {"cache": [0, 1, 2.5]}, "each step of cache must be a whole number"),
        (BASE, {"cache": [0, 1, 4, 3]}, "the steps of cache must ascend"),
        (BASE, {"cache": [0, 1, 1, 3]}, "the steps of cache must ascend"),
        (BASE, {"cache": [0, 2, 3]}, "cache must have the steps 1: a prediction needs evaluations in a row"),
        (BASE, {"cache": []}, "cache must have the steps 0, 1:"),
        (BASE, {"cache": range(50)}, "cache skips none of 50 steps"),
    ],
)
def test_what_is_refused(variant: Variant, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        GenerationRequest("a fox", **{"cache": "balanced", **options}).resolve(variant)


def test_only_the_evaluated_steps_reach_the_model(
    base: ZImagePipeline, small: dict[str, Any], count_forwards: CountForwards
) -> None:
    options = {**small, "num_inference_steps": 12, "seed": 5, "progress": False}
    with count_forwards(base) as forwards:
        output = base("a fox", cache="balanced", **options)
    schedule = output.requests[0].cache
    assert schedule == (0, 1, 2, 3, 5, 7, 10, 11)
    assert forwards["evaluation"] == 2 * len(schedule)
    again = base("a fox", cache=list(schedule), **options)
    assert again.images[0].tobytes() == output.images[0].tobytes()
    assert base("a fox", **options).images[0].tobytes() != output.images[0].tobytes()
    assert [step.index for step in base.stream(output.requests[0])] == list(range(12))


def test_a_picture_carries_its_schedule(base: ZImagePipeline, small: dict[str, Any]) -> None:
    file = io.BytesIO()
    image = base("a fox", **{**small, "num_inference_steps": 8}, cache="balanced", seed=5, progress=False).images[0]
    image.save(file, "PNG")
    recipe = read_recipe(file)
    assert recipe.request.cache == (0, 1, 2, 3, 5, 7)
    assert base.replay(recipe).same_bits


def test_latents_that_a_callback_replaced_are_evaluated(
    base: ZImagePipeline, small: dict[str, Any], count_forwards: CountForwards
) -> None:
    """No evaluation led to them: the two steps that follow are evaluated whatever the schedule says."""

    def replace_once(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return {"latents": tensors["latents"] * 0.9} if step == 5 else None

    options = {**small, "num_inference_steps": 12, "guidance_scale": 0, "cache": [0, 1, 2, 11], "progress": False}
    with count_forwards(base) as plain:
        base("a fox", seed=5, **options)
    with count_forwards(base) as replaced:
        base("a fox", seed=5, callback_on_step_end=replace_once, **options)
    assert plain["evaluation"] == 4
    assert replaced["evaluation"] == 6


def test_predictions_are_the_same_bits_alone_and_among_others(base: ZImagePipeline, small: dict[str, Any]) -> None:
    options = {**small, "num_inference_steps": 12, "cache": "balanced", "progress": False, "output_type": "latent"}
    alone = base("a fox", seed=8, **options).images
    among = base(["a cat", "a fox"], seed=[1, 8], **options).images
    assert torch.equal(alone[0], among[1])
