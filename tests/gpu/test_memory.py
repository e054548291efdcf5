"""Plans on CUDA: the same bits in every placement, copies that the host never waits for, peaks as predicted."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from zimage import GenerationRequest, ZImagePipeline
from zimage.calls import tokenize
from zimage.denoiser import Conditioning, Preparation, make_velocity, schedule
from zimage.memory.plan import Plan
from zimage.sampling.noise import seeded_noise
from zimage.sampling.samplers import SAMPLERS, sample
from zimage.testing import build_checkpoint

pytestmark = pytest.mark.gpu
PICTURE: dict[str, Any] = {"height": 512, "width": 512, "num_inference_steps": 3, "seed": 4, "progress": False}
PLACEMENTS = {
    "text from memory": {"text_encoder": "streamed"},
    "text from files": {"text_encoder": "streamed", "text_source": "files"},
    "text on the CPU": {"text_encoder": "cpu"},
    "some blocks": {"resident_blocks": 5},
    "everything": {"text_encoder": "streamed", "resident_blocks": 0, "context_resident": False},
    "everything from files": {
        "text_encoder": "streamed",
        "text_source": "files",
        "resident_blocks": 0,
        "context_resident": False,
        "block_source": "files",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("gpu") / "small", size="small", variant="base")


@pytest.fixture(scope="module")
def resident(folder: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16")


def planned(pipe: ZImagePipeline, **changes: Any) -> Plan:
    assert pipe.plan is not None
    return replace(pipe.plan, placement=replace(pipe.plan.placement, **{"slots": 2, **changes}))


@pytest.mark.parametrize("changes", PLACEMENTS.values(), ids=list(PLACEMENTS))
def test_the_same_bits_wherever_the_weights_wait(
    folder: Path, resident: ZImagePipeline, changes: dict[str, Any]
) -> None:
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16", memory=planned(resident, **changes))
    options = {**PICTURE, "guidance_scale": 3.0, "negative_prompt": "blue"}
    if changes.get("text_encoder") == "cpu":  # another device rounds the features in its own way
        features = [resident.text_encoder.encode(resident.text_encoder.tokenize(text, 512)) for text in ("fox", "blue")]
        options |= {"prompt_embeds": features[0], "negative_prompt_embeds": features[1]}
        del options["negative_prompt"]
    prompt = None if "prompt_embeds" in options else "fox"
    for _ in range(2):
        assert pipe(prompt, **options).images[0].tobytes() == resident(prompt, **options).images[0].tobytes()


def test_a_streamed_step_never_waits_for_the_device(folder: Path, resident: ZImagePipeline) -> None:
    pipe = ZImagePipeline.from_pretrained(
        folder, device="cuda", dtype="bfloat16", memory=planned(resident, resident_blocks=2)
    )
    request = pipe.resolve(GenerationRequest("a fox", seed=1, height=512, width=512, num_inference_steps=4))
    features = pipe.text_encoder.encode(tokenize([request], pipe.text_encoder)["a fox", 512])
    with torch.no_grad():
        velocity = make_velocity(Preparation(pipe.transformer), request, Conditioning(features))
        run = sample(SAMPLERS["euler"], velocity, seeded_noise(1, (1, 16, 64, 64)).cuda(), schedule(request).tolist())
        next(run)
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(3):
                next(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("changes", [{"slots": 0}, PLACEMENTS["everything"]], ids=["resident", "streamed"])
def test_the_predicted_peak_is_the_measured_one(
    folder: Path, resident: ZImagePipeline, changes: dict[str, Any]
) -> None:
    plan = planned(resident, **changes)
    plan = replace(plan, work=replace(plan.work, height=1024, width=1024, tokens=32))
    gc.collect()  # what other tests left
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16", memory=plan)
    torch.cuda.reset_peak_memory_stats()
    pipe("a fox", **PICTURE | {"height": 1024, "width": 1024})
    assert pipe.plan is not None
    measured = torch.cuda.max_memory_allocated() - before
    assert pipe.plan.device_peak == pytest.approx(measured, rel=0.1)


def test_a_card_that_is_too_small_is_made_do_with(folder: Path, resident: ZImagePipeline) -> None:
    """The allocator is capped below what everything resident needs."""
    expected = resident("a fox", **PICTURE).images[0].tobytes()
    device = resident.device
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16")
    pipe.text_encoder.forget()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pipe("a fox", **PICTURE)
    pipe.text_encoder.forget()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.max_memory_allocated() - 2**24) / total, device)
        output = pipe("a fox", **PICTURE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert output.stepped_down
    if "decode whole" in output.stepped_down[-1]:
        assert output.images[0].tobytes() == expected


@pytest.mark.parametrize("name", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"])
def test_the_names_of_diffusers(folder: Path, resident: ZImagePipeline, name: str) -> None:
    """Also from parts that were handed in and are on the CPU, as a script for diffusers has them."""
    expected = resident("a fox", **PICTURE).images[0].tobytes()
    loaded = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16")
    handed_in = ZImagePipeline.from_diffusers(
        ZImagePipeline.from_pretrained(folder, device="cpu", dtype="bfloat16").to_diffusers()
    )
    for pipe in (loaded, handed_in):
        getattr(pipe, name)()
        assert pipe.device.type == "cuda"
        assert pipe("a fox", **PICTURE).images[0].tobytes() == expected


def test_nothing_is_left_on_the_device(folder: Path) -> None:
    gc.collect()  # what other tests left
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16")
    pipe.enable_sequential_cpu_offload()
    pipe("a fox", **PICTURE)
    pipe.close()
    assert torch.cuda.memory_allocated() == before
