"""Plans carried out: the same bits wherever the weights wait, and no more memory than was planned."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from zimage import CheckpointError, NotEnoughMemory, RequestError, ZImagePipeline, denoiser
from zimage.kernels.switch import using
from zimage.memory import copiers
from zimage.memory.meter import AllocationMeter
from zimage.memory.plan import Plan
from zimage.memory.planner import fit_picture
from zimage.models import qwen
from zimage.models.text_encoder import TextEncoder
from zimage.testing import build_checkpoint

PICTURE: dict[str, Any] = {
    "height": 96, "width": 96, "any_size": True, "num_inference_steps": 3, "seed": 4, "progress": False,
}  # fmt: skip
UNGUIDED = {**PICTURE, "guidance_scale": 0.0}
GUIDED = {
    **PICTURE,
    "guidance_scale": 3.0,
    "negative_prompt": "blue and much longer than the other one, so that it pads",
}
STREAMED = {
    "text from files": {"text_encoder": "streamed", "text_source": "files"},
    "text from memory": {"text_encoder": "streamed"},
    "text on the CPU": {"text_encoder": "cpu"},
    "half of the blocks": {"resident_blocks": 2},
    "all blocks from files": {"resident_blocks": 0, "context_resident": False, "block_source": "files"},
    "everything": {"text_encoder": "streamed", "resident_blocks": 0, "context_resident": False},
    "three slots": {"text_encoder": "streamed", "resident_blocks": 0, "context_resident": False, "slots": 3},
    "one slot": {"text_encoder": "streamed", "resident_blocks": 1, "slots": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("base") / "model", variant="base")


@pytest.fixture(scope="module")
def resident(folder: Path) -> ZImagePipeline:
    return load(folder)


def load(folder: Path, memory: Any = "auto", dtype: str = "bfloat16") -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, device="cpu", dtype=dtype, memory=memory)


def planned(pipe: ZImagePipeline, **changes: Any) -> Plan:
    """The plan with other places; what is streamed comes from memory if nothing else is said."""
    assert pipe.plan is not None
    assert (pipe.plan.placement.text_source, pipe.plan.placement.block_source) == ("memory", "memory")
    return replace(pipe.plan, placement=replace(pipe.plan.placement, **{"slots": 2, **changes}))


def pixels(pipe: ZImagePipeline, **options: Any) -> bytes:
    return bytes(pipe("a fox", **options).images[0].tobytes())  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def expected(resident: ZImagePipeline) -> list[bytes]:
    """Two pictures of which all weights were on the device."""
    return [pixels(resident, **options) for options in (UNGUIDED, GUIDED)]


@pytest.mark.parametrize("changes", STREAMED.values(), ids=list(STREAMED))
def test_the_same_bits_wherever_the_weights_wait(
    folder: Path, resident: ZImagePipeline, expected: list[bytes], changes: dict[str, Any]
) -> None:
    pipe = load(folder, planned(resident, **changes))
    unguided, guided = expected
    assert unguided != guided
    assert [pixels(pipe, **options) for options in (UNGUIDED, GUIDED, UNGUIDED)] == [unguided, guided, unguided]


@pytest.mark.parametrize("branches", ["together", "one by one"])
def test_blocks_pass_through_once_a_step_for_both_branches_of_guidance(
    folder: Path, resident: ZImagePipeline, branches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one place each block that is needed comes anew."""
    if branches == "one by one":
        monkeypatch.setattr(denoiser, "TOGETHER", 0)
    pipe = load(folder, planned(resident, resident_blocks=0, slots=1))
    copies: list[int] = []
    fill = copiers._fill
    monkeypatch.setattr(copiers, "_fill", lambda place, source: (copies.append(len(place)), fill(place, source)))
    blocks = len(pipe.transformer.noise_refiner) + len(pipe.transformer.layers)
    for options, evaluations in ((UNGUIDED, 1), (GUIDED, 1 if branches == "together" else 2)):
        copies.clear()
        pixels(pipe, **options)
        assert len(copies) == 3 * evaluations * blocks


def test_what_is_streamed_from_files_takes_no_memory(folder: Path, resident: ZImagePipeline) -> None:
    pipe = load(folder, planned(resident, text_encoder="streamed", text_source="files"))
    layers = pipe.text_encoder.model.layers
    pixels(pipe, **PICTURE)
    assert all(parameter.is_meta for parameter in layers.parameters())
    assert not pipe.text_encoder.model.embed_tokens.weight.is_meta
    assert not any(parameter.is_meta for parameter in pipe.transformer.parameters())


def test_a_budget_chooses_the_placement(folder: Path, resident: ZImagePipeline, shallow_folder: Path) -> None:
    assert resident.plan is not None
    assert resident.plan.placement.text_encoder == "resident"
    pipe = load(shallow_folder, dtype="float32")
    assert pipe.plan is not None
    need = max(stage.device for stage in pipe.plan.stages)
    tight = load(shallow_folder, int((need - 20 * 2**20) / 0.9), dtype="float32")
    assert tight.plan is not None
    assert (tight.plan.placement.text_encoder, tight.plan.placement.text_source) == ("streamed", "files")
    assert "text encoder resident" in str(tight.plan.rejected[0].placement)
    least = load(shallow_folder, int(0.6 * need / 0.9), dtype="float32")
    assert least.plan is not None
    assert (least.plan.placement.block_source, least.weights) == ("files", None)
    assert least.plan.placement.streamed_blocks > 0
    assert pixels(least, **PICTURE) == pixels(pipe, **PICTURE)
    with pytest.raises(NotEnoughMemory, match="does not fit"):
        load(shallow_folder, "30MB", dtype="float32")


def test_the_predicted_peaks_are_the_measured_ones(shallow_folder: Path) -> None:
    """On a simulated device: everything that operations make and the weights, within a tenth."""
    pipe = load(shallow_folder, dtype="float32")
    for changes in ({}, {"text_encoder": "streamed", "resident_blocks": 2, "context_resident": False}):
        plan = planned(pipe, slots=2 if changes else 0, **changes)
        work = replace(plan.work, height=512, width=512, tokens=32)
        streamed = load(shallow_folder, replace(plan, work=work), dtype="float32")
        assert streamed.plan is not None
        predicted = {stage.name: stage.device for stage in streamed.plan.stages}
        assert measured(streamed) == pytest.approx(max(predicted.values()), rel=0.1)


def measured(pipe: ZImagePipeline) -> int:
    """The peak of a picture of 512², the streamed layers' bytes on the host left out."""
    hosted = {id(module) for module in pipe._residency._layers}
    models = (pipe.text_encoder.model, pipe.transformer, pipe.autoencoder.vae)
    away = {
        id(parameter)
        for model in models
        for module in model.modules()
        if id(module) in hosted
        for name, parameter in module.named_parameters()
        if "adaLN" not in name
    }
    meter = AllocationMeter()
    meter.adopt(parameter for model in models for parameter in model.parameters() if id(parameter) not in away)
    with meter:  # the places of the ring are made within
        pixels(pipe, height=512, width=512, num_inference_steps=1, seed=1, progress=False)
    return meter.peak


def test_a_file_that_was_changed_is_refused(folder: Path, resident: ZImagePipeline, tmp_path: Path) -> None:
    copy = build_checkpoint(tmp_path / "model", variant="base")
    pipe = load(copy, planned(resident, text_encoder="streamed", text_source="files"))
    file = copy / "text_encoder" / "model.safetensors"
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"model.safetensors has changed since the model was loaded"):
        pixels(pipe, **PICTURE)


def test_what_a_streaming_pipeline_cannot_do_is_said(
    folder: Path, resident: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moving to another device too, for which "meta" stands here."""
    pipe = load(folder, planned(resident, resident_blocks=1))
    monkeypatch.setattr("zimage.runtime.choose_device", torch.device)
    refusals: list[Callable[[], Any]] = [
        lambda: pipe.to(torch.float32),
        lambda: pipe.to("meta"),
        pipe.to_diffusers,
    ]
    for refused in refusals:
        with pytest.raises(RequestError, match="parts of this pipeline pass through the device"):
            refused()
    assert pipe.to("cpu") is pipe


def test_a_plan_of_another_model_is_refused(resident: ZImagePipeline, shallow_folder: Path) -> None:
    with pytest.raises(RequestError, match="the plan is for a model of 4 blocks and this one has 5"):
        load(shallow_folder, resident.plan)


def test_parts_handed_in_have_no_plan(resident: ZImagePipeline) -> None:
    assert ZImagePipeline.from_diffusers(resident.to_diffusers()).plan is None


def test_an_error_in_a_streamed_layer_leaves_it_as_it_was(folder: Path, resident: ZImagePipeline) -> None:
    pipe = load(folder, planned(resident, text_encoder="streamed", text_source="files"))
    layer = pipe.text_encoder.model.layers[1].mlp

    def fail(*_: Any) -> None:
        raise KeyError("once")

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="once"):
        pixels(pipe, **PICTURE)
    hook.remove()
    assert all(parameter.is_meta for parameter in pipe.text_encoder.model.layers.parameters())
    assert pixels(pipe, **PICTURE) == pixels(resident, **PICTURE)


def test_a_picture_that_does_not_fit_is_refused_before_it_is_begun(folder: Path, resident: ZImagePipeline) -> None:
    plan = planned(resident)
    pipe = load(folder, replace(plan, budget=replace(plan.budget, device=30 * 2**20, name="30MB")))
    pipe.text_encoder.model.register_forward_pre_hook(lambda *_: pytest.fail("something was computed"))
    for refused in (lambda: pipe("a fox", **PICTURE | {"height": 1024, "width": 1024}), lambda: pipe.stream("a fox")):
        with pytest.raises(NotEnoughMemory, match="1024x1024 does not fit in 30MB: "):
            refused()


def test_a_picture_decodes_in_as_many_strips_as_it_needs(
    folder: Path, resident: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(resident, slots=0)
    need = next(stage.device for stage in fit_picture(plan, 384, 128, 512)[0].stages if stage.name == "decoding")
    tight = load(folder, replace(plan, budget=replace(plan.budget, device=need - 2**19, name="tight")))
    levels = []
    decode = tight.autoencoder.decode

    def watched(latents: torch.Tensor, strip_levels: int) -> torch.Tensor:
        levels.append(strip_levels)
        return decode(latents, strip_levels)

    monkeypatch.setattr(tight.autoencoder, "decode", watched)
    for height in (384, 192):
        pixels(tight, **PICTURE | {"height": height, "width": 128, "num_inference_steps": 1})
    assert levels == [1, 0]


def test_an_amount_is_checked_before_anything_is_fetched() -> None:
    with pytest.raises(RequestError, match="memory must be 'auto' or an amount like '16GB' or '12GiB', got 'much'"):
        ZImagePipeline.from_pretrained("nobody/nothing", memory="much", local_files_only=True)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_text_encoder_that_passes_through_computes_as_one_that_stays(folder: Path, resident: ZImagePipeline) -> None:
    """Also between fused kernels, for which its layers' hooks are no hindrance."""
    pipe = load(folder, planned(resident, text_encoder="streamed"))
    assert qwen.is_plain(pipe.text_encoder.model)
    tokens = pipe.text_encoder.tokenize("a fox in the snow", 64)
    with using("on"):
        streamed, stayed = (
            TextEncoder(one.text_encoder.model, one.text_encoder.tokenizer, one.text_encoder.device).encode(tokens)
            for one in (pipe, resident)
        )
    assert torch.equal(streamed, stayed)
    pipe.close()
