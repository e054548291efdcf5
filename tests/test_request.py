"""What a call means: the recipe of each model where nothing is said, one request per image, and nothing left open.

A resolved request resolves to itself, and the request it reopens to asks for the same picture.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zimage import GenerationRequest, RequestError, ResolvedRequest, ZImagePipeline
from zimage.request import expand_requests, with_noise
from zimage.rules import MAX_SEED, SAMPLERS
from zimage.variants import BASE, TURBO, VARIANTS, Variant

from .conftest import CountForwards


class Named(str, Enum):  # noqa: UP042 - as most write it
    """As web frameworks check what they are asked for."""

    HEUN = "heun"


EMBEDS = torch.linspace(-1, 1, 5 * 2560).reshape(5, 2560)
LATENTS = torch.linspace(-2, 2, 16 * 8 * 8).reshape(16, 8, 8)


@pytest.mark.parametrize(
    ("model", "steps", "guidance", "shift"), [("turbo", 8, 0.0, 3.0), ("base", 50, 4.0, 6.0)], ids=["turbo", "base"]
)
def test_a_plain_request_is_the_recipe(model: str, steps: int, guidance: float, shift: float) -> None:
    resolved = GenerationRequest("a fox", seed=7).resolve(VARIANTS[model])
    assert resolved == ResolvedRequest(
        variant=model,
        prompt="a fox",
        negative_prompt="",
        height=1024,
        width=1024,
        num_inference_steps=steps,
        guidance_scale=guidance,
        cfg_normalization=0.0,
        cfg_truncation=1.0,
        seed=7,
        sampler="euler",
        shift=shift,
        sigmas=(),
        max_sequence_length=512,
    )


@pytest.mark.parametrize(("model", "evaluations", "texts"), [("turbo", 8, 1), ("base", 100, 2)], ids=["turbo", "base"])
def test_a_plain_call_takes_the_evaluations_of_the_recipe(
    model: str, evaluations: int, texts: int, request: pytest.FixtureRequest, count_forwards: CountForwards
) -> None:
    """Counted in the network, at 64² because the number of steps does not depend on the size."""
    folder = request.getfixturevalue(f"{model}_folder")
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")
    with count_forwards(pipe) as forwards:
        output = pipe("a fox", height=64, width=64, any_size=True, progress=False)
    assert forwards["evaluation"] == evaluations == pipe.variant.evaluations
    assert forwards["text"] == texts
    assert forwards["decoding"] == 1
    assert output.requests[0].guidance_scale == pipe.variant.guidance_scale


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({"guidance_scale": 0}, 4),
        ({}, 8),
        ({"cfg_truncation": 0.0}, 5),
        ({"sampler": "dpmpp_2m"}, 8),
        ({"sampler": "heun"}, 14),
        ({"sampler": Named.HEUN}, 14),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": None}, 4),
    ],
)
def test_evaluations_of_other_options(
    options: dict[str, Any],
    evaluations: int,
    base: ZImagePipeline,
    count_forwards: CountForwards,
    small: dict[str, Any],
) -> None:
    """Guidance doubles them, truncated guidance in part (here after the first step), Heun again, but for its last."""
    with count_forwards(base) as forwards:
        base("a fox", output_type="latent", **{**small, "num_inference_steps": 4, **options})
    assert forwards["evaluation"] == evaluations


def test_a_turbo_picture_is_1024_pixels_square(turbo: ZImagePipeline, count_forwards: CountForwards) -> None:
    with count_forwards(turbo) as forwards:
        output = turbo("a fox", seed=3, output_type="latent")
    assert output.images.shape == (1, 16, 128, 128)
    assert forwards["evaluation"] == 8


def test_one_request_per_image_in_diffusers_order() -> None:
    requests = expand_requests(["a", "b"], negative_prompt=["x", "y"], num_images_per_prompt=2, seed=10, height=512)
    assert [(one.prompt, one.negative_prompt, one.seed, one.height) for one in requests] == [
        ("a", "x", 10, 512),
        ("a", "x", 11, 512),
        ("b", "y", 12, 512),
        ("b", "y", 13, 512),
    ]


def test_one_entry_serves_all_prompts() -> None:
    requests = expand_requests(["a", "b", "c"], negative_prompt="x", seed=[5, 5, 1])
    assert [(one.prompt, one.negative_prompt, one.seed) for one in requests] == [
        ("a", "x", 5),
        ("b", "x", 5),
        ("c", "x", 1),
    ]
    assert [one.seed for one in expand_requests("a", num_images_per_prompt=3)] == [None, None, None]
    assert [one.seed for one in expand_requests("a", seed=MAX_SEED - 1, num_images_per_prompt=2)] == [
        MAX_SEED - 1,
        MAX_SEED,
    ]


def test_tensors_go_to_their_images() -> None:
    latents = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 16, 2, 2)
    embeds = [torch.zeros(3, 8), torch.ones(4, 8)]
    requests = expand_requests(None, prompt_embeds=embeds, latents=latents, num_images_per_prompt=2)
    assert [one.prompt_embeds is embeds[index] for index, one in zip((0, 0, 1, 1), requests, strict=True)] == [True] * 4
    assert [float(one.latents.mean()) for one in requests] == [0.0, 1.0, 2.0, 3.0]
    assert embeds[0].shape == (3, 8)


def test_callers_lists_are_not_changed() -> None:
    prompts, negatives, seeds = ["a", "b"], ["x"], [1, 2]
    for _ in range(2):
        expand_requests(prompts, negative_prompt=negatives, seed=seeds)
    assert (prompts, negatives, seeds) == (["a", "b"], ["x"], [1, 2])


def test_a_schedule_of_another_shift_is_kept() -> None:
    resolved = GenerationRequest("a").resolve(TURBO, shift=4.5)
    assert resolved.shift == 4.5
    assert resolved.resolve(TURBO, shift=4.5) == resolved
    with pytest.raises(RequestError, match=r"resolved for a schedule with shift 4\.5, the pipeline's is 3"):
        resolved.resolve(TURBO, shift=3.0)


def test_a_request_of_one_model_does_not_run_on_the_other() -> None:
    resolved = GenerationRequest("a").resolve(BASE)
    with pytest.raises(RequestError, match="resolved for base, the pipeline holds turbo; make a GenerationRequest of"):
        resolved.resolve(TURBO)


def test_a_resolved_request_that_was_made_by_hand_is_checked() -> None:
    resolved = GenerationRequest("a").resolve(TURBO)
    for change in (
        {"guidance_scale": 4.0},
        {"height": 1000},
        {"seed": -1},
        {"sampler": "ddim"},
        {"negative_prompt": "x"},
    ):
        with pytest.raises(RequestError):
            replace(resolved, **change).resolve(TURBO)


def test_what_a_tensor_is_filled_with_later_is_not_of_the_request() -> None:
    embeds, latents = EMBEDS.clone(), LATENTS.clone()
    asked = GenerationRequest(prompt_embeds=embeds, latents=latents, height=64, width=64, any_size=True)
    resolved = asked.resolve(BASE)
    for tensor in (embeds, latents):
        tensor.zero_()
    assert torch.equal(resolved.tensors["prompt_embeds"], EMBEDS)
    assert torch.equal(resolved.tensors["latents"][0], LATENTS)


def test_tensors_survive_resolving_again() -> None:
    asked = GenerationRequest(
        prompt_embeds=EMBEDS, negative_prompt_embeds=EMBEDS[:2], latents=LATENTS, height=64, width=64, any_size=True
    )
    first = asked.resolve(BASE)
    assert list(first.tensors) == ["prompt_embeds", "negative_prompt_embeds", "latents"]
    assert first.tensors["latents"].shape == (1, 16, 8, 8)
    assert (first.prompt, first.seed) == ("", 0)
    second = first.resolve(BASE)
    assert second == first
    assert all(torch.equal(second.tensors[name], tensor) for name, tensor in first.tensors.items())
    assert torch.equal(second.tensors["prompt_embeds"], EMBEDS)
    sent = pickle.loads(pickle.dumps(first))
    assert sent == first
    assert all(torch.equal(sent.tensors[name], tensor) for name, tensor in first.tensors.items())


@pytest.mark.parametrize("more", [{"hires": 2}, {"diversity": 1.0}])
def test_a_seed_beside_latents_stays_where_something_is_drawn_from_it(more: dict[str, Any]) -> None:
    asked = GenerationRequest("a", seed=7, latents=LATENTS, height=64, width=64, any_size=True, **more)
    first = asked.resolve(TURBO)
    assert first.seed == 7
    assert first.resolve(TURBO) == first
    assert replace(asked, seed=None).resolve(TURBO).seed == 0
    plain = replace(first, hires=None, diversity=0.0)
    assert plain.resolve(TURBO).seed == 0


PIXELS = np.zeros((4, 4, 3), dtype=np.uint8)
DIFFERENT: list[tuple[str, Any, Any]] = [
    *((name, Image.fromarray(PIXELS), Image.fromarray(PIXELS)) for name in ("image", "mask_image", "control_image")),
    ("image", PIXELS, PIXELS.copy()),
    ("image", memoryview(bytearray(b"a")), memoryview(bytearray(b"b"))),
    ("image", "a.png", "b.png"),
    ("image", LATENTS[:3], LATENTS[3:6]),
    ("latents", LATENTS, -LATENTS),
    ("latents", LATENTS, LATENTS.double()),
    ("latents", LATENTS, None),
    *((name, EMBEDS, EMBEDS[1:]) for name in ("prompt_embeds", "negative_prompt_embeds")),
    ("sigmas", [1, 0.5], [1, 0.4]),
    ("adapters", {"ink": 0.5}, {"ink": 0.6}),
]


@pytest.mark.parametrize(("name", "one", "other"), DIFFERENT, ids=lambda value: value if isinstance(value, str) else "")
def test_requests_of_different_pictures_are_not_equal(name: str, one: Any, other: Any) -> None:
    first, again, second = (GenerationRequest("x", seed=1, **{name: value}) for value in (one, one, other))
    assert first != second
    assert first == again
    assert hash(first) == hash(again)
    assert len({first: 1, again: 2, second: 3}) == 2


def test_equal_values_ask_for_one_picture() -> None:
    def asked(kind: type, **more: Any) -> GenerationRequest:
        return GenerationRequest("x", sigmas=kind([1, 0.5]), latents=LATENTS.clone(), image=Path("a.png"), **more)

    first = asked(list, adapters={"a": 1.0, "b": 0.5})
    second = asked(tuple, adapters={"b": 0.5, "a": 1})
    assert first == second
    assert hash(first) == hash(second)
    assert pickle.loads(pickle.dumps(first)) == first


def test_resolved_requests_with_different_tensors_are_not_equal() -> None:
    asked = GenerationRequest("a fox", height=64, width=64, latents=LATENTS, any_size=True)
    first, same, other = (replace(asked, latents=one).resolve(TURBO) for one in (LATENTS, LATENTS.clone(), -LATENTS))
    assert first == same != other
    assert hash(first) == hash(same)
    assert first != with_noise(first)
    assert first != asked


def test_other_noise_for_a_request() -> None:
    first = GenerationRequest("a", seed=7, height=64, width=64, any_size=True).resolve(TURBO)
    other = with_noise(first, latents=LATENTS[None])
    assert (other.seed, other.tensors["latents"].shape) == (0, (1, 16, 8, 8))
    back = with_noise(other, seed=9)
    assert back == replace(first, seed=9)
    assert not back.tensors
    assert not first.tensors


sides = st.integers(1, 512).map(lambda count: 16 * count)
sigma_lists = st.lists(st.integers(1, 10**4), min_size=1, max_size=20, unique=True).map(
    lambda levels: [level / 10**4 for level in sorted(levels, reverse=True)]
)
IMAGES = ("image", "mask_image", "control_image")
unit = st.floats(0, 1)
strengths = st.floats(0, 50)


@st.composite
def accepted(draw: st.DrawFn) -> tuple[GenerationRequest, Variant]:
    """A request with any options that its model accepts, each given or left out."""
    variant = draw(st.sampled_from([BASE, TURBO]))
    options: dict[str, st.SearchStrategy[Any]] = {
        "height": sides,
        "width": sides,
        "seed": st.integers(0, MAX_SEED),
        "sampler": st.sampled_from(SAMPLERS),
        "max_sequence_length": st.integers(1, 1504),
        "diversity": st.floats(0, 4),
    }
    steps = st.fixed_dictionaries({}, optional={"num_inference_steps": st.integers(1, 1000)})
    by_steps_or_sigmas = draw(st.one_of(steps, st.fixed_dictionaries({"sigmas": sigma_lists})))
    if variant is BASE:
        options["guidance_scale"] = st.floats(0, 50, exclude_min=True)
        options |= {
            "negative_prompt": st.text(),
            "cfg_normalization": strengths | st.booleans(),
            "cfg_truncation": unit,
        }
    chosen = draw(st.fixed_dictionaries({}, optional=options))
    return GenerationRequest(draw(st.text()), **chosen, **by_steps_or_sigmas, any_size=True), variant


@given(accepted())
@settings(max_examples=200, deadline=None)
def test_any_accepted_request_resolves_to_a_fixed_point(case: tuple[GenerationRequest, Variant]) -> None:
    asked, variant = case
    first = asked.resolve(variant)
    assert first.resolve(variant) == first
    assert first.reopen().resolve(variant) == first
    assert first.reopen().resolve(variant).reopen() == first.reopen()
    values = {field.name: getattr(first, field.name) for field in fields(first)}
    assert all(value is not None for name, value in values.items() if name not in (*IMAGES, "hires"))
    assert all(math.isfinite(value) for value in values.values() if isinstance(value, float))
    for name in ("height", "width", "sampler", "seed", "prompt", "num_inference_steps", "guidance_scale"):
        assert getattr(asked, name) in (None, values[name])


@given(
    st.sampled_from([BASE, TURBO]),
    st.dictionaries(
        st.sampled_from([field.name for field in fields(GenerationRequest)]),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=5),
            st.lists(st.floats() | st.text(max_size=2), max_size=3),
            st.sampled_from([EMBEDS, LATENTS, EMBEDS.int(), LATENTS * math.nan, torch.tensor(1.0)]),
        ),
    ),
)
@settings(max_examples=400, deadline=None)
def test_any_values_at_all_resolve_or_are_a_request_error(variant: Variant, options: dict[str, Any]) -> None:
    try:
        resolved = GenerationRequest(**options).resolve(variant)
    except RequestError:
        return
    assert resolved.resolve(variant) == resolved
