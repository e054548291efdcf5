"""One plan for two models: it fits, counts what is shared once, and leaves each model a share that is its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from zimage import NotEnoughMemory, RequestError
from zimage.memory.pairs import PairPlan, pair_sizes, plan_pair
from zimage.memory.plan import Budget
from zimage.memory.planner import plan_model
from zimage.memory.sizes import RELEASED, ModelSizes

GIB = 2**30


def planned(gigabytes: float, *, turbo: ModelSizes = RELEASED, host: int | None = 64 * GIB, **asked: str) -> PairPlan:
    budget = Budget.of_card(int(gigabytes * 10**9), host, f"{gigabytes}GB")
    return plan_pair(RELEASED, turbo, partial(plan_model, dtype="bfloat16", budget=budget, **asked))


@pytest.mark.parametrize(
    ("gigabytes", "text_encoder", "resident", "peak"),
    [
        (40, "resident", 32, 31.64),
        (32, "streamed", 32, 24.71),
        (24.5, "streamed", 26, 20.38),
        (16, "streamed", 15, 13.13),
        (12, "streamed", 10, 9.83),
        (8, "streamed", 4, 5.88),
    ],
)
def test_both_released_models_fit_together(gigabytes: float, text_encoder: str, resident: int, peak: float) -> None:
    plan = planned(gigabytes).both
    assert (plan.placement.text_encoder, plan.placement.resident_blocks) == (text_encoder, resident)
    assert plan.device_peak / GIB == pytest.approx(peak, abs=0.01)
    assert plan.device_peak <= plan.budget.device
    assert plan.host_peak <= (plan.budget.host or 0)
    if gigabytes == 16:
        assert plan.host_peak / GIB == pytest.approx(20.76, abs=0.01)


def test_what_is_shared_is_counted_once() -> None:
    both = pair_sizes(RELEASED, RELEASED)
    assert both.text_encoder == RELEASED.text_encoder
    assert both.vae == RELEASED.vae
    assert both.transformer == 2 * RELEASED.transformer
    one = plan_model(RELEASED, "bfloat16", Budget(device=64 * GIB, host=None))
    two = planned(80).both
    assert two.device_peak - one.device_peak == 2 * RELEASED.transformer  # bfloat16


@pytest.mark.parametrize("gigabytes", [40, 24.5, 16, 8])
def test_each_model_has_what_the_other_leaves(gigabytes: float) -> None:
    """Both transformers and what is shared, at the busier of the two, are what the plan of both says."""
    plans = planned(gigabytes)
    for own in (plans.base, plans.turbo):
        assert own.placement == plans.both.placement
        assert own.sizes == RELEASED
        assert own.device_peak <= own.budget.device
        other = plans.both.budget.device - own.budget.device
        for stage, whole in zip(own.stages, plans.both.stages, strict=True):
            assert stage.device + other == whole.device
        assert (own.budget.host or 0) - own.host_peak == (plans.both.budget.host or 0) - plans.both.host_peak
    resident = plans.both.placement.resident_blocks
    block = 2 * RELEASED.blocks[0]
    held = resident * block + 2 * (2 * RELEASED.context_blocks[0] + RELEASED.transformer_rest)
    context = plans.both.placement.context_resident
    held -= 0 if context else 2 * 2 * RELEASED.context_blocks[0]
    blocks_in_ring = plans.both.placement.slots * block if plans.both.placement.blocks_wait else 0
    assert plans.both.budget.device - plans.base.budget.device == held + blocks_in_ring


def test_on_a_cpu_there_is_one_memory() -> None:
    budget = Budget.of_host(32 * 10**9, "32GB")
    plans = plan_pair(RELEASED, RELEASED, partial(plan_model, dtype="float32", budget=budget))
    assert plans.both.placement.weights == "bfloat16"
    assert plans.base.budget.host is plans.turbo.budget.host is None
    assert plans.both.device_peak <= budget.device


def test_what_cannot_be_planned_is_refused() -> None:
    shallow = replace(RELEASED, blocks=RELEASED.blocks[:-1])
    with pytest.raises(RequestError, match="the transformers have 32 and 31 blocks"):
        planned(40, turbo=shallow)
    with pytest.raises(NotEnoughMemory, match="does not fit"):
        planned(1.5)


def test_layers_of_a_file_in_fewer_bits_are_counted_in_the_one_that_has_them() -> None:
    packed = replace(RELEASED, blocks=(0,) * 32, packed_blocks=(100,) * 32, in_bfloat16=False)
    both = pair_sizes(RELEASED, packed)
    assert both.packed_blocks == packed.packed_blocks
    assert both.blocks == RELEASED.blocks
    assert not both.in_bfloat16
