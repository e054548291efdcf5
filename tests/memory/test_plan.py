"""Plans fit what they were made for, prefer speed, say what they rejected, and refuse with what would fit."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zimage import NotEnoughMemory, RequestError
from zimage.memory.peaks import STAGING, predict
from zimage.memory.plan import (
    LEAST_MARGIN,
    Budget,
    Placement,
    Plan,
    parse_memory,
)
from zimage.memory.planner import fit_picture, fits_beside, lower, make_plan, plan_model, require_fit
from zimage.memory.sizes import (
    RELEASED,
    Work,
    decode_activations,
    denoise_activations,
    encode_activations,
    text_activations,
)

GIB = 2**30
ROOMY = 64 * GIB


def card(gigabytes: float, host: int | None = ROOMY) -> Budget:
    return Budget.of_card(int(gigabytes * 10**9), host, f"{gigabytes}GB")


@pytest.mark.parametrize(
    ("gigabytes", "most", "text_encoder", "resident"),
    [
        (24.5, 20.3, "resident", 32),
        (16, 13.5, "streamed", 32),
        (12, 10.5, "streamed", 23),
        (8, 6.5, "streamed", 12),
        (4, 3.4, "streamed", 1),
    ],
)
def test_cards(gigabytes: float, most: float, text_encoder: str, resident: int) -> None:
    """At 1024² in bfloat16, within what issue and documents promise for the card."""
    plan = make_plan(RELEASED, Work(tokens=128), card(gigabytes))
    assert plan.device_peak <= most * GIB
    assert plan.placement.text_encoder == text_encoder
    assert plan.placement.resident_blocks == resident
    assert plan.placement.strip_levels == 0


def test_float32_is_widened_from_bfloat16_files_before_anything_is_streamed() -> None:
    """On a CPU without bfloat16 instructions, whose memory is the host's."""
    work, host = Work(dtype="float32", height=512, width=512), Budget.of_host(32 * GIB, "32GiB")
    plan = make_plan(RELEASED, work, host)
    assert (plan.placement.weights, plan.placement.text_encoder) == ("bfloat16", "resident")
    assert plan.device_peak < 24 * GIB
    assert [one.placement.weights for one in plan.rejected] == [None]
    assert make_plan(RELEASED, work, Budget.of_host(64 * GIB, "64GiB")).placement.weights is None
    assert make_plan(replace(RELEASED, in_bfloat16=False), work, host).placement.weights is None
    assert make_plan(RELEASED, work, host, weights="full").placement.text_source == "files"
    assert make_plan(RELEASED, replace(work, dtype="bfloat16"), host).placement.weights is None


def test_everything_resident_is_the_sum_of_weights_and_what_a_stage_needs() -> None:
    work = Work(tokens=100, dtype="float32")
    plan = make_plan(RELEASED, work, card(80))
    weights = 4 * (RELEASED.text_encoder + RELEASED.transformer + RELEASED.vae)
    assert {stage.name: stage.device - weights for stage in plan.stages} == {
        "prompt": text_activations(RELEASED, work),
        "denoising": denoise_activations(RELEASED, work),
        "decoding": decode_activations(RELEASED, work),
    }
    assert (plan.host_peak, plan.rejected, plan.placement.slots) == (0, (), 0)


def locked(*sizes: float) -> int:
    """Bytes of page-locked memory that torch takes for layers together: for a block of 338 MiB 512, for three 1024."""
    return int(2 ** math.ceil(math.log2(sum(sizes))))


def test_streamed_blocks_move_from_the_device_to_the_host() -> None:
    work, budget = Work(tokens=128), card(8)
    plan = make_plan(RELEASED, work, budget)
    three_less = replace(plan.placement, resident_blocks=plan.placement.resident_blocks - 3)
    block = 2 * RELEASED.blocks[0]
    for before, after in zip(plan.stages, predict(RELEASED, work, budget, three_less), strict=True):
        assert (before.device - after.device, after.host - before.host) == (3 * block, locked(*[block] * 3))
    one_more = replace(plan.placement, resident_blocks=plan.placement.resident_blocks + 1)
    assert max(stage.device for stage in predict(RELEASED, work, budget, one_more)) > budget.device


def test_the_rejected_come_with_their_reason() -> None:
    plan = make_plan(RELEASED, Work(tokens=128), card(12))
    assert [str(one.placement) for one in plan.rejected] == [
        "text encoder resident, transformer resident, decode whole",
        "text encoder streamed, transformer resident, decode whole",
    ]
    assert plan.rejected[0].reason == "decoding needs 20.17 GiB of the device and 10.06 GiB may be used"


def test_strips_only_where_nothing_else_fits() -> None:
    work = Work(height=2048, width=2048, tokens=128)
    assert [make_plan(RELEASED, work, card(size)).placement.strip_levels for size in (8.5, 6, 4.8)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("host", "sources"), [(32, ("memory", "memory")), (14, ("files", "memory")), (2, ("files", "files"))]
)
def test_what_the_host_cannot_hold_comes_from_files(host: int, sources: tuple[str, str]) -> None:
    plan = make_plan(RELEASED, Work(tokens=128), card(8, host * GIB))
    assert (plan.placement.text_source, plan.placement.block_source) == sources
    assert plan.host_peak <= host * GIB


def test_a_device_that_is_the_host() -> None:
    """22 GiB hold everything for a picture of 256²; within 15 GiB the text encoder passes through, then blocks do."""
    work = Work(height=256, width=256, tokens=128)
    plan = make_plan(RELEASED, work, Budget(device=22 * GIB, host=None))
    assert plan.placement.text_encoder == "resident"
    plan = make_plan(RELEASED, work, Budget(device=15 * GIB, host=None))
    assert plan.placement.text_encoder == "streamed"
    assert plan.placement.text_source == "files"
    assert plan.device_peak < 13 * GIB
    plan = make_plan(RELEASED, work, Budget(device=12 * GIB, host=None))
    assert str(plan.placement) == "text encoder streamed, 30 of 32 blocks resident, decode whole"
    assert plan.placement.block_source == "files"
    assert make_plan(RELEASED, work, Budget(device=2 * GIB, host=None)).placement.resident_blocks == 0
    least = Budget(device=int(1.7 * GIB), host=None)
    with pytest.raises(NotEnoughMemory, match="even with text encoder streamed, 0 of 32 blocks resident"):
        make_plan(RELEASED, work, least, weights="full")
    plan = make_plan(RELEASED, work, least)
    assert plan.placement.weights == "int8"
    assert {one.placement.weights for one in plan.rejected} == {None, "int8"}


@pytest.mark.parametrize(("weights", "block"), [("full", 2.0), ("int8", 1.0), ("float8", 1.0), ("nf4", 0.5625)])
def test_weights_of_fewer_bits(weights: str, block: float) -> None:
    """Of what moves; embedders, modulations and the final layer stay, and a product needs its weight widened."""
    work = Work(tokens=128)
    plan = make_plan(RELEASED, work, card(80), weights=weights)
    layers = sum(RELEASED.text_layers) + sum(RELEASED.blocks) + sum(RELEASED.context_blocks)
    rest = RELEASED.text_rest + RELEASED.transformer_rest + RELEASED.vae
    widened = 0 if weights == "full" else 2 * 3840 * 10240
    assert plan.stages[1].device == pytest.approx(
        block * layers + 2 * rest + denoise_activations(RELEASED, work) + widened, rel=1e-6
    )
    streamed = make_plan(RELEASED, work, card(4), weights=weights)
    assert streamed.placement.weights == (None if weights == "full" else weights)
    moved = [*RELEASED.text_layers, *RELEASED.blocks[: streamed.placement.streamed_blocks]]
    moved += [] if streamed.placement.context_resident else RELEASED.context_blocks
    waiting = streamed.host_peak - 2 * RELEASED.text_rest - STAGING
    assert sum(moved) * block <= waiting <= 1.08 * sum(moved) * block


def test_what_waits_in_files_passes_through_page_locked_memory_layer_by_layer() -> None:
    plan = make_plan(RELEASED, Work(tokens=128), card(8))
    files = replace(plan.placement, text_source="files", block_source="files")
    (host,) = {stage.host for stage in predict(RELEASED, plan.work, plan.budget, files)}
    assert host == 2 * RELEASED.text_rest + STAGING + locked(2 * RELEASED.blocks[0])
    one = replace(files, text_encoder="resident", resident_blocks=31, context_resident=True)
    (host,) = {stage.host for stage in predict(RELEASED, plan.work, plan.budget, one)}
    assert host == STAGING + locked(2 * RELEASED.blocks[0])
    apart = replace(plan.placement, text_encoder="cpu", resident_blocks=32, context_resident=True, slots=0)
    (host,) = {stage.host for stage in predict(RELEASED, plan.work, plan.budget, apart)}
    assert host == 2 * RELEASED.text_rest + STAGING + 2 * sum(RELEASED.text_layers)  # which nothing copies


def test_int8_only_where_nothing_else_fits() -> None:
    work = Work(tokens=128)
    assert make_plan(RELEASED, work, card(4)).placement.weights is None
    assert make_plan(RELEASED, work, card(2.7)).placement.weights == "int8"
    with pytest.raises(
        RequestError, match="weight_dtype must be full, bfloat16, int8, float8, nf4, or left out; got 'int4'"
    ):
        make_plan(RELEASED, work, card(80), weights="int4")


def test_a_rung_keeps_what_weights_are_stored_as() -> None:
    for weights in ("full", "int8"):
        plan = make_plan(RELEASED, Work(tokens=128), card(80), weights=weights)
        assert {rung.placement.weights for rung in rungs(plan, "denoising")} == {plan.placement.weights}


@pytest.mark.parametrize("quantize_activations", [False, True])
def test_a_rung_keeps_whether_activations_are_rounded(quantize_activations: bool) -> None:
    asked: dict[str, Any] = {"weights": "int8", "quantize_activations": quantize_activations}
    plan = make_plan(RELEASED, Work(tokens=128), card(12), **asked)
    found = rungs(plan, "denoising")
    assert len(found) > 2
    assert {rung.placement.quantize_activations for rung in (plan, *found)} == {quantize_activations}
    least = make_plan(RELEASED, Work(tokens=128), card(4), **asked)
    assert {one.placement.quantize_activations for one in (least, *least.rejected)} == {quantize_activations}


def test_a_text_encoder_that_is_told_where_to_be() -> None:
    work = Work(tokens=128)
    assert make_plan(RELEASED, work, card(80), text_encoder="cpu").placement.text_encoder == "cpu"
    assert make_plan(RELEASED, work, card(80), text_encoder="streamed").device_peak < 14 * GIB
    plan = make_plan(RELEASED, work, card(16), text_encoder="resident")
    assert plan.placement.text_encoder == "resident"
    assert plan.placement.resident_blocks < 32
    with pytest.raises(RequestError, match="must be 'resident', 'streamed' or 'cpu', got 'gpu'"):
        make_plan(RELEASED, work, card(80), text_encoder="gpu")


def test_a_refusal_names_a_size_that_fits() -> None:
    work, budget = Work(height=2048, width=1024, tokens=128), card(3)
    with pytest.raises(NotEnoughMemory) as refused:
        make_plan(RELEASED, work, budget)
    said = re.search(r"(\d+)x(\d+) would fit", str(refused.value))
    assert said is not None
    make_plan(RELEASED, replace(work, width=int(said[1]), height=int(said[2])), budget)
    with pytest.raises(NotEnoughMemory, match="nor does a smaller picture"):
        make_plan(RELEASED, work, card(1.5))


@example(gigabytes=4.5, host=None, tokens=1, sides=(16, 16), dtype="float32")  # int8, a GiB more bfloat16
@given(
    gigabytes=st.floats(0.5, 100),
    host=st.none() | st.integers(0, 64),
    tokens=st.integers(1, 512),
    sides=st.tuples(st.integers(16, 128), st.integers(16, 128)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_every_plan_fits_and_no_faster_one_did(
    gigabytes: float, host: int | None, tokens: int, sides: tuple[int, int], dtype: str
) -> None:
    work = Work(height=16 * sides[0], width=16 * sides[1], tokens=tokens, dtype=dtype)
    budget = card(gigabytes, None if host is None else host * GIB)
    try:
        plan = make_plan(RELEASED, work, budget)
    except NotEnoughMemory:
        return  # told by the tests above
    assert fits(plan)
    for other in plan.rejected:
        assert not fits(replace(plan, stages=predict(RELEASED, work, budget, other.placement)))
    richer = make_plan(RELEASED, work, replace(budget, device=budget.device + GIB))
    if richer.placement.weights != plan.placement.weights:
        kinds = ["int8", "bfloat16", None]
        assert kinds.index(richer.placement.weights) > kinds.index(plan.placement.weights), "smaller with more memory"
        return
    assert richer.placement.strip_levels <= plan.placement.strip_levels
    if richer.placement.strip_levels == plan.placement.strip_levels:
        assert richer.placement.resident_blocks >= plan.placement.resident_blocks


def fits(plan: Plan) -> bool:
    return plan.device_peak <= plan.budget.device and (plan.budget.host is None or plan.host_peak <= plan.budget.host)


def test_the_margin() -> None:
    assert Budget.of_card(40 * GIB, None).device == 36 * GIB
    assert Budget.of_card(8 * GIB, None).device == 8 * GIB - LEAST_MARGIN
    assert Budget.of_card(GIB // 2, None).device == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("auto", None),
        ("16GB", 16 * 10**9),
        (" 12.5 gib ", int(12.5 * GIB)),
        ("8192MiB", 8 * GIB),
        (12345678, 12345678),
        (10**11, 10**11),
        ("500KB", 500_000),
        ("1500000", 1500000),
        ("16000000000", 16 * 10**9),
        (np.int64(16 * 10**9), 16 * 10**9),
    ],
)
def test_amounts(text: Any, count: int | None) -> None:
    assert parse_memory(text) == count


@pytest.mark.parametrize(
    "text", ["", "lots", "800M", "-4GB", "0GB", "16 TB", 0, -1, True, None, 3.5, "1e3GB", "9" * 40]
)
def test_what_is_no_amount(text: Any) -> None:
    with pytest.raises(RequestError, match="memory must be 'auto' or an amount like '16GB'"):
        parse_memory(text)


@pytest.mark.parametrize(("text", "wanted"), [("16", "16GB"), (16, "16GB"), ("12.5", "12.5GB"), (24576, "24576MB")])
def test_an_amount_whose_unit_was_forgotten(text: Any, wanted: str) -> None:
    message = f"memory must have a unit, got {text!r}, which is so many bytes; write '{wanted}'"
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        parse_memory(text)


def test_a_plan_as_text_and_as_data() -> None:
    plan = make_plan(RELEASED, Work(tokens=128), card(12))
    assert str(plan).splitlines()[0] == (
        "1024x1024, bfloat16: text encoder streamed, 23 of 32 blocks resident, decode whole"
    )
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["device_peak"] == plan.device_peak == max(stage["device"] for stage in data["stages"])
    assert data["placement"]["resident_blocks"] == 23


def test_a_model_that_is_too_large_for_its_own_size_is_planned_for_a_smaller_one() -> None:
    budget = card(2.9)
    with pytest.raises(NotEnoughMemory):
        make_plan(RELEASED, Work(), budget, weights="full")
    assert plan_model(RELEASED, "bfloat16", budget, weights="full").work == Work(height=512, width=512)
    assert plan_model(RELEASED, "bfloat16", card(12)).work == Work()
    with pytest.raises(NotEnoughMemory, match="1024x1024 does not fit"):
        plan_model(RELEASED, "bfloat16", card(1))


def test_a_picture_takes_as_few_strips_as_it_needs() -> None:
    plan = make_plan(RELEASED, Work(tokens=128), card(16))
    assert fit_picture(plan, 1024, 1024, 128)[0].placement == plan.placement
    assert fit_picture(plan, 1024, 1536, 128)[0].placement.strip_levels == 1
    require_fit(plan, 1024, 1536, 128)
    with pytest.raises(NotEnoughMemory, match=r"2048x2048 does not fit in 16GB: denoising needs 14\..* smaller size"):
        require_fit(plan, 2048, 2048, 128)
    free = replace(plan, budget=replace(plan.budget, name="auto"))
    require_fit(free, 2048, 2048, 128)
    assert fit_picture(free, 2048, 2048, 128)[0].placement.strip_levels == 2


def test_streamed_blocks_are_spread_evenly() -> None:
    spread = Placement(text_encoder="resident", resident_blocks=5, blocks=8, context_resident=True, slots=2)
    assert spread.streamed == (0, 2, 4)
    assert replace(spread, resident_blocks=8).streamed == ()
    assert replace(spread, resident_blocks=0).streamed == tuple(range(8))


@pytest.mark.parametrize("blocks", [1, 4, 12, 32])
def test_what_is_streamed_stays_so_when_more_is(blocks: int) -> None:
    before: set[int] = set()
    for resident in range(blocks, -1, -1):
        placement = Placement(
            text_encoder="resident", resident_blocks=resident, blocks=blocks, context_resident=True, slots=2
        )
        now = set(placement.streamed)
        assert len(now) == blocks - resident
        assert before <= now
        gaps = [after - one for one, after in pairwise([*sorted(now), min(now, default=0) + blocks])]
        assert max(gaps, default=1) <= max(1, 2 * -(-blocks // max(1, len(now))))
        before = now


def rungs(plan: Plan, stage: str, **options: Any) -> list[Plan]:
    """Down to the last, which must come."""
    found = [plan]
    with suppress(NotEnoughMemory):
        while len(found) < 100:
            found.append(lower(found[-1], stage, **options))
    with pytest.raises(NotEnoughMemory, match=f"{stage} ran out of memory at 1024x1024, where .* no more frugal plan"):
        lower(found[-1], stage, **options)
    return found


@pytest.mark.parametrize("stage", ["prompt", "denoising", "decoding"])
@pytest.mark.parametrize("host", [ROOMY, 4 * GIB])
def test_every_rung_needs_less_and_takes_nothing_back(stage: str, host: int) -> None:
    plan = make_plan(RELEASED, Work(tokens=128), card(80, host))
    need = {one.name: one.device for one in plan.stages}[stage]
    ladder = rungs(plan, stage)
    assert len(ladder) > 5
    for before, after in pairwise(ladder):
        assert {one.name: one.device for one in after.stages}[stage] < need
        need = {one.name: one.device for one in after.stages}[stage]
        assert fits(after)
        assert set(before.placement.streamed) <= set(after.placement.streamed)
        assert (before.placement.text_waits, before.placement.strip_levels) <= (
            after.placement.text_waits,
            after.placement.strip_levels,
        )
        for waits, source in (("text_waits", "text_source"), ("blocks_wait", "block_source")):
            if getattr(before.placement, waits) and getattr(before.placement, source) == "files":
                assert getattr(after.placement, source) == "files"
    assert {one.name: one.device for one in ladder[-1].stages}["denoising"] < 2.7 * GIB


def test_rungs_of_parts_that_were_handed_in() -> None:
    """Without files weights wait in the host's memory; where the device is that memory only strips are left."""
    plan = make_plan(RELEASED, Work(tokens=128), card(80))
    assert {rung.placement.text_source for rung in rungs(plan, "denoising", has_files=False)} == {"memory"}
    plan = make_plan(RELEASED, Work(tokens=128), Budget(device=30 * GIB, host=None))
    assert len(rungs(plan, "denoising", has_files=False)) == 1
    first, second, *others = rungs(plan, "denoising")
    assert [first.placement.text_encoder, second.placement.text_encoder] == ["resident", "streamed"]
    assert all(rung.placement.block_source == "files" for rung in others)
    assert others[-1].placement.resident_blocks == 0


def test_a_text_encoder_on_the_cpu_stays_there() -> None:
    plan = make_plan(RELEASED, Work(tokens=128), card(80), text_encoder="cpu")
    assert {rung.placement.text_encoder for rung in rungs(plan, "denoising")} == {"cpu"}


def test_where_the_device_is_the_host_it_keeps_the_embedding() -> None:
    work, sizes = Work(height=256, width=256, tokens=128), RELEASED
    plan = make_plan(sizes, work, Budget(device=15 * GIB, host=None))
    weights = sizes.transformer + sizes.vae + sizes.text_rest + 2 * sizes.text_layers[0]
    assert plan.stages[0].device == 2 * weights + text_activations(sizes, work)


PICTURE, LARGE = (1024, 1024, 512), (1536, 1536, 512)


@pytest.mark.parametrize(
    ("stage", "picture", "need"),
    [
        ("decoding", PICTURE, decode_activations(RELEASED, Work())),
        ("decoding", LARGE, decode_activations(RELEASED, Work(height=1536, width=1536))),
        ("prompt", PICTURE, text_activations(RELEASED, Work())),
        ("prompt", (1024, 1024, 99), text_activations(RELEASED, Work(tokens=99))),
    ],
)
def test_what_fits_beside_the_steps_of_another_picture(stage: str, picture: tuple[int, int, int], need: int) -> None:
    """The weights once, what the stage needs, and the most that prompt and steps of the other need: to the byte."""
    plan = make_plan(RELEASED, Work(), card(80))
    for current in [PICTURE, *([(256, 256, 512)] if stage == "decoding" else [])]:
        stages = fit_picture(plan, *current)[0].stages
        busiest = max(one.device for one in stages if one.name != "decoding")
        for missing in (0, 1):
            budget = replace(plan.budget, device=busiest + need - missing)
            assert fits_beside(replace(plan, budget=budget), stage, picture, current) == (not missing)


def test_a_text_encoder_that_passes_through_is_never_beside_steps() -> None:
    plan = make_plan(RELEASED, Work(), card(80), text_encoder="streamed")
    assert not fits_beside(plan, "prompt", PICTURE, PICTURE)
    assert fits_beside(plan, "decoding", PICTURE, PICTURE)
    elsewhere = make_plan(RELEASED, Work(), card(80), text_encoder="cpu")
    full = replace(elsewhere, budget=replace(elsewhere.budget, device=elsewhere.device_peak))
    assert fits_beside(full, "prompt", PICTURE, PICTURE)
    assert not fits_beside(full, "decoding", PICTURE, PICTURE)


@pytest.mark.parametrize(("memory", "side"), [(24.5, 1024), (16, 1024), (8, 1024), (4, 768)])
def test_a_picture_from_an_image_fits_where_one_from_noise_does(memory: float, side: int) -> None:
    plan = make_plan(RELEASED, Work(height=side, width=side), card(memory))
    for levels in (0, 1, 2):
        placed = replace(plan, placement=replace(plan.placement, strip_levels=levels))
        fitted, reason = fit_picture(placed, side, side, 512, True)
        assert not reason
        assert fitted.placement == fit_picture(placed, side, side, 512)[0].placement
        assert [stage.name for stage in fitted.stages] == ["prompt", "image", "denoising", "decoding"]
        need = {stage.name: stage.device for stage in fitted.stages}
        work = Work(height=side, width=side)
        own, strips = need["decoding"] - need["image"], fitted.placement.strip_levels
        assert own == decode_activations(RELEASED, work, strips) - encode_activations(RELEASED, work, strips) > 0


def test_an_image_that_needs_most_is_refused_for_itself() -> None:
    """As that of a model does whose steps and autoencoder are so narrow that the image's own pixels count."""
    narrow, work = replace(RELEASED, dim=128, vae_channels=(8, 8, 8, 8)), Work(height=2048, width=2048)
    plan = make_plan(narrow, Work(height=512, width=512), card(24.5))
    plain = predict(narrow, work, plan.budget, replace(plan.placement, strip_levels=2))
    tight = replace(plan, budget=replace(plan.budget, device=max(stage.device for stage in plain)))
    assert not fit_picture(tight, 2048, 2048, 512)[1]
    fitted, reason = fit_picture(tight, 2048, 2048, 512, True)
    assert fitted.placement.strip_levels == 2
    assert reason.startswith("image needs ")
    with pytest.raises(NotEnoughMemory, match=r"2048x2048 does not fit in 24\.5GB: image needs"):
        require_fit(tight, 2048, 2048, 512, True)


@pytest.mark.parametrize("side", [512, 1024, 1536, 2048])
def test_the_peak_of_the_released_models_is_the_same_with_an_image(side: int) -> None:
    """It needs less than the decode."""
    plan = make_plan(RELEASED, Work(height=512, width=512), card(24.5))
    for levels in (0, 1, 2):
        placement = replace(plan.placement, strip_levels=levels)
        plain, with_image = (
            max(
                stage.device
                for stage in predict(RELEASED, Work(height=side, width=side, from_image=one), plan.budget, placement)
            )
            for one in (False, True)
        )
        assert plain == with_image
