"""The two recipes are those of the model cards, and a checkpoint is recognised surely or not at all."""

from __future__ import annotations

import dataclasses

import pytest

from zimage import VARIANTS, CheckpointError, RequestError
from zimage.variants import BASE, TURBO, detect_variant, get_variant


def test_base_is_as_its_model_card_has_it() -> None:
    assert (BASE.hub_id, BASE.title) == ("Tongyi-MAI/Z-Image", "Z-Image")
    assert (BASE.shift, BASE.num_inference_steps, BASE.guidance_scale) == (6.0, 50, 4.0)
    assert BASE.supports_guidance
    assert BASE.evaluations == 100


def test_turbo_is_as_its_model_card_has_it() -> None:
    assert (TURBO.hub_id, TURBO.title) == ("Tongyi-MAI/Z-Image-Turbo", "Z-Image-Turbo")
    assert (TURBO.shift, TURBO.num_inference_steps, TURBO.guidance_scale) == (3.0, 8, 0.0)
    assert not TURBO.supports_guidance
    assert TURBO.evaluations == 8


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_what_both_share(variant: object) -> None:
    shared = {
        "height": 1024,
        "width": 1024,
        "cfg_normalization": 0.0,
        "cfg_truncation": 1.0,
        "sampler": "euler",
        "max_sequence_length": 512,
    }
    assert {name: getattr(variant, name) for name in shared} == shared


def test_a_variant_is_found_by_its_name_and_cannot_be_changed() -> None:
    assert VARIANTS == {"base": BASE, "turbo": TURBO}
    assert get_variant("turbo") is TURBO
    with pytest.raises(dataclasses.FrozenInstanceError):
        TURBO.num_inference_steps = 9  # type: ignore[misc]


@pytest.mark.parametrize("name", ["Turbo", "", None, ["turbo"], 3])
def test_an_unknown_name_lists_the_known_ones(name: object) -> None:
    with pytest.raises(RequestError, match=r"variant must be one of base, turbo, got "):
        get_variant(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variant", "hub_id", "shift", "expected"),
    [
        ("turbo", None, None, TURBO),
        ("base", None, 3.0, BASE),
        ("turbo", None, 6.0, TURBO),
        ("turbo", "me/finetune", 5.0, TURBO),
        ("base", BASE.hub_id, 6.0, BASE),
        (None, TURBO.hub_id, None, TURBO),
        (None, BASE.hub_id, 6.0, BASE),
        (None, BASE.hub_id, 4.5, BASE),
        (None, None, 3.0, TURBO),
        (None, None, 6.0, BASE),
        (None, "me/finetune", 6, BASE),
        (None, "/models/z-image-turbo", 6.0, BASE),
    ],
)
def test_detection(variant: str | None, hub_id: str | None, shift: float | None, expected: object) -> None:
    """An explicit variant, then the hub id, then the shift; never a part of a name."""
    assert detect_variant(variant=variant, hub_id=hub_id, shift=shift) is expected


@pytest.mark.parametrize("shift", [None, 1.0, 4.5], ids=["none", "1", "4.5"])
def test_what_nothing_tells_is_asked(shift: float | None) -> None:
    came = "no shift" if shift is None else f"shift {shift:g}"
    with pytest.raises(CheckpointError, match=f"{came} .*say which: variant='base' or variant='turbo'") as raised:
        detect_variant(variant=None, hub_id="someone/z-image-turbo-mix", shift=shift)
    assert "6 is base, 3 is turbo" in str(raised.value)


def test_a_hub_id_and_a_shift_that_disagree_are_asked_about() -> None:
    with pytest.raises(CheckpointError, match=r"shift 3 is that of turbo; say which it is: variant='base' or variant="):
        detect_variant(variant=None, hub_id=BASE.hub_id, shift=3.0)
    assert detect_variant(variant="base", hub_id=BASE.hub_id, shift=3.0) is BASE


def test_the_other_models_own_repository_is_not_renamed() -> None:
    with pytest.raises(CheckpointError, match=r"Tongyi-MAI/Z-Image is Z-Image \(base\); leave variant out, or load"):
        detect_variant(variant="turbo", hub_id=BASE.hub_id, shift=6.0)
    with pytest.raises(RequestError, match="variant must be one of"):
        detect_variant(variant="base ", hub_id=None, shift=6.0)
