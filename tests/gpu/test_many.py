"""`generate_many` on CUDA: the bits of single calls with a second stream beside the steps, and only where it fits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from zimage import GenerationRequest, ZImagePipeline
from zimage.testing import build_checkpoint

pytestmark = pytest.mark.gpu
REQUESTS = [
    GenerationRequest(
        f"picture {number} of a fox", seed=number, height=height, width=512, num_inference_steps=3, **more
    )
    for number, (height, more) in enumerate(
        [(512, {}), (768, {"negative_prompt": "blue"}), (512, {"guidance_scale": 0}), (512, {"sampler": "heun"})] * 2
    )
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("gpu") / "small", size="small", variant="base")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16")


@pytest.fixture(scope="module")
def expected(pipe: ZImagePipeline) -> list[bytes]:
    return alone(pipe)


def alone(pipe: ZImagePipeline) -> list[bytes]:
    return [pipe(request, progress=False).images[0].tobytes() for request in REQUESTS]


def together(pipe: ZImagePipeline, requests: Sequence[GenerationRequest] = REQUESTS) -> list[bytes]:
    pipe.text_encoder.forget()
    drawn = list(pipe.generate_many(requests, progress=False))
    assert [one.index for one in drawn] == list(range(len(requests)))
    assert {one.stepped_down for one in drawn} == {()}
    return [one.image.tobytes() for one in drawn]


def streams_of(pipe: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bool]]:
    """For the text encoder and the decoder, whether they computed on another stream than the default one."""
    found: dict[str, set[bool]] = {"_hidden_states": set(), "decode": set()}

    def watched(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            found[name].add(torch.cuda.current_stream() != torch.cuda.default_stream())
            return compute(*given)

        return call

    for owner, name in ((pipe.text_encoder, "_hidden_states"), (pipe.autoencoder, "decode")):
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_picture_is_that_of_a_call(folder: Path, dtype: str) -> None:
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype=dtype)
    expected = alone(pipe)
    for _ in range(3):
        assert together(pipe) == expected
    assert alone(pipe) == expected  # from features that were encoded on the side stream


def test_what_is_beside_a_step_has_a_stream_of_its_own(
    pipe: ZImagePipeline, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = streams_of(pipe, monkeypatch)
    assert together(pipe) == expected
    assert found == {"_hidden_states": {False, True}, "decode": {False, True}}  # the first prompt, the last decode


def test_without_room_no_decode_is_beside_a_step(
    folder: Path, pipe: ZImagePipeline, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget in which the largest pictures fit alone, with not a byte to spare."""
    tall = [number for number, request in enumerate(REQUESTS) if request.height == 768]
    assert pipe.plan is not None
    plan = replace(pipe.plan, work=replace(pipe.plan.work, height=768, width=512))
    other = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16", memory=plan)
    assert other.plan is not None
    other._plan = replace(other.plan, budget=replace(other.plan.budget, device=other.plan.device_peak))
    found = streams_of(other, monkeypatch)
    assert together(other, [REQUESTS[number] for number in tall]) == [expected[number] for number in tall]
    assert found["decode"] == {False}


@pytest.mark.parametrize("name", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_layers_that_pass_through_are_not_beside_steps(
    folder: Path, expected: list[bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    other = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16")
    getattr(other, name)()
    found = streams_of(other, monkeypatch)
    assert together(other) == expected
    assert found["_hidden_states"] == {False}


def test_threads_take_turns(pipe: ZImagePipeline, expected: list[bytes]) -> None:
    made: list[list[bytes]] = []
    threads = [
        threading.Thread(target=lambda work=work: made.append(work(pipe)), daemon=True)
        for work in (alone, alone, lambda one: [drawn.image.tobytes() for drawn in one.generate_many(REQUESTS)])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert made == [expected] * 3


def test_memory_that_runs_out_beside_a_step(folder: Path, pipe: ZImagePipeline, expected: list[bytes]) -> None:
    """The allocator is capped at what single calls need, which the plan does not know."""
    pipe.text_encoder.forget()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    assert alone(pipe) == expected
    total = torch.cuda.get_device_properties(pipe.device).total_memory
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    pipe.text_encoder.forget()
    try:
        torch.cuda.set_per_process_memory_fraction((peak + 2**24) / total, pipe.device)
        drawn = list(pipe.generate_many(REQUESTS, progress=False))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, pipe.device)
    told = [sentence for one in drawn for sentence in one.stepped_down]
    assert all("since then: " in sentence for sentence in told)
    if all("strips" not in sentence for sentence in told):
        assert [one.image.tobytes() for one in drawn] == expected
