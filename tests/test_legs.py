"""Where the base model's part of a schedule ends and Turbo's begins, and what both cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from zimage import GenerationRequest, RelayRequest, RequestError
from zimage.editing import SourceImage
from zimage.variants import BASE, TURBO


def make(handover: float, steps: int = 50, turbo_steps: int = 8, **options: object) -> RelayRequest:
    base = GenerationRequest("a fox", seed=1, num_inference_steps=steps, **options).resolve(BASE)  # type: ignore[arg-type]
    return RelayRequest(
        base, GenerationRequest("a fox", seed=1, num_inference_steps=turbo_steps).resolve(TURBO), handover
    )


@pytest.mark.parametrize("handover", [0.999, 0.95, 0.9, 0.83, 0.5, 0.1, 0.001, 1.1e-5])
def test_the_parts_meet_at_the_handover_and_nothing_is_lost(handover: float) -> None:
    base, turbo = make(handover).levels
    assert base[-1] == turbo[0] == torch.tensor(handover)
    assert (base[0], turbo[-1]) == (1, 0)
    for levels in (base, turbo):
        assert (levels[1:] < levels[:-1]).all()
    whole = [6 * s / (1 + 5 * s) for s in (1 - index / 50 for index in range(50))]
    assert base[:-1].tolist() == pytest.approx([level for level in whole if level > handover + 1e-5], abs=1e-6)
    whole = [3 * s / (1 + 2 * s) for s in (1 - index / 8 for index in range(8))]
    assert turbo[1:].tolist() == pytest.approx([*(level for level in whole if level < handover - 1e-5), 0], abs=1e-6)


def test_a_level_of_a_schedule_is_not_taken_twice() -> None:
    """0.9 is the third of Turbo's levels and the 21st of the base model's 50, but for rounding."""
    base, turbo = make(0.9).levels
    assert (len(base), len(turbo)) == (21, 7)
    assert turbo[1].item() == pytest.approx(15 / 18)


@pytest.mark.parametrize(
    ("handover", "options", "evaluations"),
    [
        (0.9, {}, 40 + 6),
        (0.9, {"guidance_scale": 0.0}, 20 + 6),
        (0.9, {"cfg_truncation": 0.05}, 40 - 8 + 6),
        (0.75, {"steps": 12}, 16 + 4),
        (0.75, {"steps": 12, "sampler": "heun"}, 32 + 4),
        (0.5, {"turbo_steps": 16}, 2 * 43 + 4),
    ],
)
def test_what_a_picture_costs(handover: float, options: dict[str, object], evaluations: int) -> None:
    request = make(handover, **options)  # type: ignore[arg-type]
    assert request.evaluations == evaluations
    assert request.steps == sum(len(levels) - 1 for levels in request.levels)


def test_both_are_asked_for_one_picture() -> None:
    request = make(0.5)
    for change in ({"seed": 2}, {"prompt": "an owl"}, {"height": 512}):
        with pytest.raises(RequestError, match=f"they have another {next(iter(change))}"):
            replace(request, turbo=replace(request.turbo, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("handover", "said"),
    [
        (1.0, "base part"),
        (0.999995, "base part"),
        (0.0, "Turbo part"),
        (1e-50, "Turbo part"),
        (9e-6, r"Turbo part has no step: .* the handover is 9e-06; choose one between, more than 1e-05 from"),
        (1.5, "handover must be"),
    ],
)
def test_a_part_without_steps_is_refused(handover: float, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        _ = make(handover).levels


def test_turbo_is_not_steered() -> None:
    """What it would be asked for could not act."""
    options = {"any_size": True, "height": 64, "width": 64, "seed": 1}
    base = GenerationRequest("a fox", **options).resolve(BASE)  # type: ignore[arg-type]
    turbo = GenerationRequest("a fox", **options).resolve(TURBO)  # type: ignore[arg-type]
    steered = replace(turbo, control_image=SourceImage(64, 64, "a" * 64), controlnet_conditioning_scale=1.0)
    with pytest.raises(RequestError, match="a ControlNet steers the base model's part"):
        RelayRequest(base, steered, 0.75)
    assert RelayRequest(base, turbo, 0.75).handover == 0.75
