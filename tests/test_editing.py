"""What a request may say about an image, what follows for sizes and steps, and that nothing else is accepted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage.caching import noise_levels
from zimage.editing import SourceImage, skipped_steps
from zimage.errors import RequestError
from zimage.request import GenerationRequest, ResolvedRequest, expand_requests
from zimage.sampling.schedule import shifted_sigmas
from zimage.variants import BASE, TURBO

IMAGE = SourceImage(600, 480, "a" * 64, pixels="pixels")
MASK = SourceImage(600, 480, "b" * 64)


def resolve(**asked: Any) -> ResolvedRequest:
    return GenerationRequest("a fox", seed=7, **{"image": IMAGE, **asked}).resolve(TURBO)


@pytest.mark.parametrize(
    ("asked", "strength"),
    [
        ({}, 0.6),
        ({"mask_image": MASK}, 1.0),
        ({"padding": 16}, 1.0),
        ({"padding": np.int64(16)}, 1.0),
        ({"strength": 1}, 1.0),
        ({"strength": 0.25}, 0.25),
    ],
)
def test_strength_is_diffusers_where_none_is_given(asked: dict[str, Any], strength: float) -> None:
    assert resolve(**asked).strength == strength


def test_a_resolved_request_carries_its_image_and_resolves_to_itself() -> None:
    asked = {"mask_image": MASK, "strength": 0.5, "keep_steps": True, "padding": (8, 0, 8, 16)}
    resolved = resolve(**asked)
    assert {name: getattr(resolved, name) for name in asked} == asked
    assert resolved.image is IMAGE
    assert resolved.resolve(TURBO) == resolved
    assert resolved.reopen().resolve(TURBO).image is IMAGE
    assert resolved != resolve(**{**asked, "mask_image": replace(MASK, digest="c" * 64)})
    assert resolved == resolve(**{**asked, "image": replace(IMAGE, pixels=None)})
    assert GenerationRequest("a fox").resolve(TURBO).strength == 1


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ({}, (480, 592)),
        ({"padding": (64, 0, 56, 32)}, (512, 720)),
        ({"height": 512, "width": 512}, (512, 512)),
        ({"height": 960}, (960, 1200)),
        ({"width": 304}, (240, 304)),
        ({"width": np.int64(304)}, (240, 304)),
        ({"image": replace(IMAGE, width=256, height=256)}, (256, 256)),
        ({"image": replace(IMAGE, width=9, height=700), "any_size": True}, (688, 16)),
    ],
)
def test_the_size_follows_from_the_image(asked: dict[str, Any], size: tuple[int, int]) -> None:
    resolved = resolve(**{"any_size": True, **asked})
    assert (resolved.height, resolved.width) == size


@pytest.mark.parametrize(
    ("strength", "steps"), [(1.0, 8), (0.99, 8), (0.9, 8), (0.75, 6), (0.6, 5), (0.5, 4), (0.3, 3), (0.1, 1), (0.01, 1)]
)
def test_steps_that_are_left(strength: float, steps: int) -> None:
    """diffusers' numbers of Turbo's 8 steps."""
    assert resolve(strength=strength).steps == steps
    assert resolve(strength=strength, keep_steps=True).steps == 8
    assert resolve(strength=strength).num_inference_steps == 8


@given(st.integers(1, 1000), st.floats(0, 1, exclude_min=True), st.booleans())
def test_levels_are_those_of_the_schedule(steps: int, strength: float, keep_steps: bool) -> None:
    levels = shifted_sigmas(steps, 3.0, (), strength, keep_steps)
    skipped = skipped_steps(steps, strength, keep_steps)
    assert len(levels) == steps - skipped + 1
    if keep_steps:
        assert levels[0].item() == pytest.approx(3 * strength / (1 + 2 * strength), rel=1e-5)
    else:
        assert torch.equal(levels, shifted_sigmas(steps, 3.0)[skipped:])
        assert skipped <= steps - steps * strength < skipped + 1 or steps * strength < 1e-9
    torch.testing.assert_close(
        torch.tensor(noise_levels(steps, 3.0, (), strength, keep_steps)), levels[:-1], rtol=1e-4, atol=1e-6
    )


def test_kept_steps_at_full_strength_are_all_steps_anyway() -> None:
    assert resolve(strength=1.0, keep_steps=True) == resolve(strength=1.0)


def test_predicted_steps_are_counted_in_the_run_that_is_left() -> None:
    asked = GenerationRequest("a fox", image=IMAGE, strength=0.6, cache="balanced", seed=1)
    short, whole = asked.resolve(BASE), replace(asked, keep_steps=True).resolve(BASE)
    assert (short.steps, whole.steps) == (30, 50)
    assert short.cache[-1] == 29
    assert whole.cache[-1] == 49
    assert len(short.cache) < 20
    with pytest.raises(RequestError, match="cache skips none of 4 steps"):
        replace(asked, strength=0.08).resolve(BASE)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"image": None, "mask_image": MASK}, "mask_image is about an image and none is given; pass image"),
        ({"image": None, "strength": 0.5}, "strength is about an image"),
        ({"image": None, "strength": 0}, "strength is about an image"),
        ({"image": None, "padding": 8}, "padding is about an image"),
        ({"image": None, "keep_steps": True}, "keep_steps is about an image"),
        ({"latents": torch.zeros(16, 60, 74), "seed": None}, "image and latents are both given"),
        ({"mask_image": replace(MASK, width=601)}, "must have the size of image, 600x480; it is 601x480"),
        ({"strength": 0}, "strength must be above 0: with 0 the picture is the image"),
        ({"strength": 1e-20}, r"strength 1e-20 leaves none of 8 steps; raise it to 0.125, or keep_steps=True"),
        ({"strength": -0.1}, "strength must be a number from 0 to 1, got float -0.1"),
        ({"strength": 1.01}, "strength must be a number from 0 to 1"),
        ({"strength": "0.5"}, "strength must be a number"),
        ({"keep_steps": 1}, "keep_steps must be True or False"),
        ({"padding": 0}, "padding is 0 on every side"),
        ({"padding": (0, 0, 0, 0)}, "padding is 0 on every side"),
        ({"padding": (8, 8)}, "padding must be pixels on left, top, right, bottom"),
        ({"padding": "8888"}, "padding must be pixels"),
        ({"image": replace(IMAGE, width=4, height=30000), "padding": (8192, 0, 0, 0)}, "is 8196x30000, 246 megapixels"),
        ({"padding": (8, 8, 8, -8)}, "padding on the bottom must be a whole number from 0 to 8192, got -8"),
        ({"padding": (8.5, 8, 8, 8)}, "padding on the left must be a whole number"),
        ({"height": 10**400}, "height must be a whole number from 1 to 8192"),
        ({"width": 100_000}, "width must be a whole number from 1 to 8192, got 100000"),
        ({"image": "a.png"}, "image was not read yet, it is str 'a.png'; a pipeline's `resolve` reads it"),
        ({"mask_image": [1]}, "mask_image was not read yet"),
        ({"image": replace(IMAGE, width=4000, height=3000)}, "Choose a size, to which the image is scaled"),
    ],
)
def test_what_cannot_work_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        GenerationRequest("a fox", **{"image": IMAGE, **asked}).resolve(TURBO)


def test_a_list_has_an_image_for_each_prompt() -> None:
    other = replace(IMAGE, digest="d" * 64)
    requests = expand_requests(["a", "b"], image=[IMAGE, other], mask_image=MASK, num_images_per_prompt=2)
    assert [one.image for one in requests] == [IMAGE, IMAGE, other, other]
    assert {one.mask_image for one in requests} == {MASK}
    with pytest.raises(RequestError, match="image has 2 entries for 1 prompts"):
        expand_requests("a", image=(IMAGE, other))
    with pytest.raises(RequestError, match="image is an empty list"):
        expand_requests("a", image=[])


def test_a_control_image_and_its_scale() -> None:
    plain = GenerationRequest("a fox", seed=7).resolve(TURBO)
    assert (plain.control_image, plain.controlnet_conditioning_scale) == (None, 0)
    asked = GenerationRequest("a fox", seed=7, control_image=IMAGE)
    steered = asked.resolve(TURBO)
    assert (steered.control_image, steered.controlnet_conditioning_scale) == (IMAGE, 0.75)
    assert (steered.height, steered.width, steered.strength) == (480, 592, 1)
    assert steered != plain
    for scale in (0, 0.3, 2):
        resolved = replace(asked, controlnet_conditioning_scale=scale).resolve(TURBO)
        assert resolved.controlnet_conditioning_scale == scale
        assert resolved.resolve(TURBO) == resolved
    both = replace(asked, image=replace(IMAGE, width=512), strength=0.5).resolve(TURBO)
    assert (both.width, both.strength, both.controlnet_conditioning_scale) == (512, 0.5, 0.75)
    latents = torch.zeros(16, 60, 74)
    assert replace(asked, latents=latents, seed=None).resolve(TURBO).tensors["latents"].shape == (1, 16, 60, 74)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"controlnet_conditioning_scale": 0.5}, "is about a control_image and none is given; pass control_image, or"),
        ({"controlnet_conditioning_scale": 0}, "is about a control_image"),
        ({"control_image": "a.png"}, "control_image was not read yet"),
        ({"control_image": IMAGE, "controlnet_conditioning_scale": 2.5}, "must be a number from 0 to 2, got float 2.5"),
        ({"control_image": IMAGE, "controlnet_conditioning_scale": -0.1}, "must be a number from 0 to 2"),
        ({"control_image": IMAGE, "controlnet_conditioning_scale": float("nan")}, "must be a number from 0 to 2"),
        ({"control_image": IMAGE, "strength": 0.5}, "strength is about an image"),
        ({"control_image": replace(IMAGE, width=4000, height=3000)}, "Choose a size, to which the image is"),
    ],
)
def test_what_cannot_steer_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        GenerationRequest("a fox", **asked).resolve(TURBO)
