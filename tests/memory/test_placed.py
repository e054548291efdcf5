"""Pipelines that are moved into a more frugal plan by hand, by diffusers' names for that, and pipelines that end."""

from __future__ import annotations

import gc
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from zimage import RequestError, ZImagePipeline
from zimage.memory.plan import Plan
from zimage.memory.residency import Residency
from zimage.runtime import numbered_device
from zimage.testing import build_checkpoint
from zimage.testing.configs import SIZES

PICTURE: dict[str, Any] = {"height": 128, "width": 128, "num_inference_steps": 2, "seed": 4, "any_size": True}
Change = Callable[[ZImagePipeline], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("base") / "model", variant="base")


@pytest.fixture(scope="module")
def expected(folder: Path) -> bytes:
    return pixels(load(folder))


def load(folder: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, device="cpu", dtype="float32")


def pixels(pipe: ZImagePipeline, **options: Any) -> bytes:
    return bytes(pipe("a fox", progress=False, **{**PICTURE, **options}).images[0].tobytes())  # type: ignore[union-attr]


def plan_of(pipe: ZImagePipeline) -> Plan:
    assert pipe.plan is not None
    return pipe.plan


CHANGES: dict[str, tuple[Change, dict[str, Any]]] = {
    "model offload": (
        lambda pipe: pipe.enable_model_cpu_offload(),
        {"text_encoder": "streamed", "resident_blocks": 4, "context_resident": True, "text_source": "files"},
    ),
    "sequential offload": (
        lambda pipe: pipe.enable_sequential_cpu_offload(),
        {"text_encoder": "streamed", "resident_blocks": 0, "context_resident": False, "block_source": "files"},
    ),
    "group offload": (
        lambda pipe: pipe.enable_group_offload(onload_device="cpu", offload_type="leaf_level", use_stream=True),
        {"text_encoder": "streamed", "resident_blocks": 0, "context_resident": False},
    ),
    "group offload of the text encoder": (
        lambda pipe: pipe.enable_group_offload(exclude_modules=("transformer", "vae")),
        {"text_encoder": "streamed", "resident_blocks": 4, "context_resident": True},
    ),
    "group offload of the transformer": (
        lambda pipe: pipe.enable_group_offload(exclude_modules=["text_encoder"], offload_to_disk_path="/nowhere"),
        {"text_encoder": "resident", "resident_blocks": 0, "context_resident": False},
    ),
    "one after the other": (
        lambda pipe: [change() for change in (pipe.enable_sequential_cpu_offload, pipe.enable_model_cpu_offload)],
        {"text_encoder": "streamed", "resident_blocks": 0, "context_resident": False},
    ),
}


@pytest.mark.parametrize(("change", "placement"), CHANGES.values(), ids=list(CHANGES))
def test_the_names_of_diffusers_choose_a_plan(
    folder: Path, expected: bytes, change: Change, placement: dict[str, Any]
) -> None:
    pipe = load(folder)
    change(pipe)
    assert {name: getattr(plan_of(pipe).placement, name) for name in placement} == placement
    away = [parameter.is_meta for parameter in pipe.transformer.layers.parameters()]
    assert any(away) == (placement["resident_blocks"] == 0)
    layers = pipe.text_encoder.model.layers
    assert all(parameter.is_meta for parameter in layers.parameters()) == (placement["text_encoder"] == "streamed")
    for prompt_length in ("", " in the snow"):
        pipe.text_encoder.forget()
        pipe("a fox" + prompt_length, progress=False, **PICTURE)
        assert pixels(pipe) == expected
    with pytest.raises(RequestError, match="parts of this pipeline pass through the device"):
        pipe.to(torch.bfloat16)


def test_before_and_after_a_picture(folder: Path, expected: bytes) -> None:
    pipe = load(folder)
    assert pixels(pipe) == expected
    before = plan_of(pipe)
    pipe.enable_sequential_cpu_offload()
    assert plan_of(pipe).device_peak < before.device_peak
    pipe.text_encoder.forget()
    assert pixels(pipe) == expected


def test_tiling_decodes_in_strips(folder: Path, expected: bytes) -> None:
    pipe = load(folder)
    asked: list[int] = []
    decode = pipe.autoencoder.decode

    def watched(latents: torch.Tensor, strip_levels: int = 0) -> torch.Tensor:
        asked.append(strip_levels)
        return decode(latents, strip_levels)

    pipe.autoencoder.decode = watched  # type: ignore[method-assign]
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
    tiled = pixels(pipe)
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert pixels(pipe) == expected
    assert asked == [1, 0]
    assert max(abs(one - other) for one, other in zip(tiled, expected, strict=True)) <= 2


def test_parts_that_were_handed_in_have_nowhere_to_wait(folder: Path, expected: bytes) -> None:
    pipe = ZImagePipeline.from_diffusers(load(folder).to_diffusers())
    for change in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload, pipe.enable_group_offload):
        with pytest.raises(RequestError, match="these parts were handed in; load the model with from_pretrained"):
            change()
    pipe.enable_vae_tiling()
    pipe.disable_vae_tiling()
    assert pixels(pipe) == expected


def test_memory_of_the_host_where_the_device_is_another(folder: Path, expected: bytes) -> None:
    """As on a card, the placement carried out by hand: handed-in parts wait in memory."""
    loaded = load(folder)
    pipe = ZImagePipeline.from_diffusers(loaded.to_diffusers())
    blocks = len(pipe.transformer.layers) + len(pipe.transformer.noise_refiner)
    placement = replace(
        plan_of(loaded).placement, text_encoder="streamed", resident_blocks=blocks - 3, slots=2, context_resident=False
    )
    pipe._residency.place(placement, torch.device("cpu"))
    buffers = {id(layer.source) for layer in pipe._residency._layers.values()}
    assert len(buffers) == 2 + 2 + 3
    assert pixels(pipe) == expected
    assert pixels(loaded) == expected, "the modules are shared, and at rest they are whole"


@pytest.mark.parametrize(
    ("given", "device"),
    [((None, None), None), ((1, None), "cuda:1"), ((None, "cuda"), "cuda"), ((0, "cuda"), "cuda:0"),
     ((2, "cuda:2"), "cuda:2")],
)  # fmt: skip
def test_two_ways_to_name_a_device(given: tuple[Any, Any], device: str | None) -> None:
    assert numbered_device(*given) == device


def test_wrong_devices_are_refused(folder: Path) -> None:
    pipe = load(folder)
    with pytest.raises(RequestError, match="gpu_id=1 and device='cuda:0' are two devices"):
        pipe.enable_model_cpu_offload(gpu_id=1, device="cuda:0")
    with pytest.raises(RequestError, match="offload_device must be the CPU, got 'cuda'"):
        pipe.enable_group_offload(offload_device="cuda")
    for options in ({"device": "nonsense"}, {"gpu_id": 0, "device": "nonsense"}):
        with pytest.raises(RequestError, match="device 'nonsense' cannot be used here"):
            pipe.enable_model_cpu_offload(**options)
    with pytest.raises(RequestError, match="device 'nonsense' cannot be used here"):
        pipe.enable_group_offload("cpu", offload_device="nonsense")
    for excluded in (["transfomer"], "transfomer", ["vae", 5], 5):
        with pytest.raises(RequestError, match="must be out of text_encoder, transformer, vae, controlnet; got "):
            pipe.enable_group_offload("cpu", exclude_modules=excluded)  # type: ignore[arg-type]
    assert not pipe._residency.streams


def test_a_closed_pipeline_says_so(folder: Path, expected: bytes) -> None:
    with load(folder) as pipe:
        assert pixels(pipe) == expected
    for use in (
        lambda: pixels(pipe),
        lambda: next(pipe.stream("a fox")),
        lambda: pipe.to(torch.bfloat16),
        lambda: pipe.device,
        pipe.enable_model_cpu_offload,
        pipe.to_diffusers,
    ):
        with pytest.raises(RequestError, match="this pipeline was closed; load it again"):
            use()
    pipe.close()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pipe.nothing


def test_closing_ends_a_stream_that_is_under_way(folder: Path) -> None:
    pipe = load(folder)
    steps = pipe.stream("a fox")
    next(steps)
    pipe.close()
    with pytest.raises(RequestError, match="this pipeline was closed"):
        next(steps)


@pytest.mark.parametrize("end", ["close", "collection"])
@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_is_left(folder: Path, end: str, streamed: bool) -> None:
    running = set(threading.enumerate())
    pipe = load(folder)
    if streamed:
        pipe.enable_sequential_cpu_offload()
    pixels(pipe)
    started = set(threading.enumerate()) - running
    assert bool(started) == streamed
    kept = [weakref.ref(weight) for weight in pipe.transformer.parameters()]
    kept += [weakref.ref(place.buffer) for place in (pipe._residency._ring._places if streamed else ())]  # type: ignore[union-attr]
    if end == "close":
        pipe.close()
        assert not any(one() is not None for one in kept)
    del pipe
    gc.collect()
    assert not any(one() is not None for one in kept)
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()


def test_closing_leaves_what_was_handed_in(folder: Path, expected: bytes) -> None:
    loaded = load(folder)
    ZImagePipeline.from_diffusers(loaded.to_diffusers()).close()
    assert pixels(loaded) == expected


def test_closing_what_streams_tells_whoever_shares_its_models(folder: Path, expected: bytes) -> None:
    """Layers that wait in files have no values then: what is computed with them would be of any memory."""
    loaded = load(folder)
    sharing = ZImagePipeline.from_diffusers(loaded.to_diffusers())
    loaded.enable_sequential_cpu_offload()
    assert pixels(loaded) == pixels(sharing) == expected
    loaded.close()
    for text in ("a fox", "a text that is not encoded yet"):
        with pytest.raises(RequestError, match="for a pipeline that was closed"):
            sharing(text, progress=False, **PICTURE)


def test_a_forked_process_waits_for_no_thread_that_it_does_not_have(folder: Path) -> None:
    """Neither for the one that reads layers nor for torch's."""
    threads, pipe = torch.get_num_threads(), load(folder)
    pipe.enable_sequential_cpu_offload()
    torch.set_num_threads(1)
    try:
        expected = pixels(pipe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of what is tried here
            child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                torch.set_num_threads(2)
                with pytest.raises(RequestError, match="load the model in each process"):
                    pixels(pipe)
                torch.set_num_threads(1)
                assert pixels(pipe) == expected
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.no_cover
def test_two_hundred_pictures_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many sizes and prompts, more than are cached; resident memory after the last as after the tenth."""
    monkeypatch.setitem(SIZES, "tiny", replace(SIZES["tiny"], n_layers=1, n_refiner_layers=1, text_layers=2))
    pipe, process = load(build_checkpoint(tmp_path / "least", variant="base")), psutil.Process()

    def draw(number: int) -> None:
        side = 64 + 16 * (number % 5)
        text = f"fox number {number} " * (1 + number % 7)
        pipe(text, progress=False, **{**PICTURE, "height": side, "width": 144 - side, "num_inference_steps": 1})

    for number in range(10):
        draw(number)
    gc.collect()
    before = process.memory_info().rss
    for number in range(10, 200):
        draw(number)
    gc.collect()
    assert process.memory_info().rss <= before + 20 * 2**20


def test_measured_beside_predicted(folder: Path) -> None:
    pipe = load(folder)
    pixels(pipe)
    measured = plan_of(pipe).measured
    assert measured is not None
    assert 0 <= measured < 2**40
    assert "measured until now: at most" in str(pipe.plan)
    assert plan_of(pipe).to_dict()["measured"] == measured
    weights = sum(weight.numel() * weight.element_size() for weight in pipe.transformer.parameters())
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert (plan_of(pipe).measured or 0) >= min(measured, weights), "a peak never falls"
    del held


def test_a_residency_that_was_never_placed_holds_nothing(folder: Path) -> None:
    pipe = load(folder)
    assert not pipe._residency.streams
    assert "hold" not in vars(pipe.transformer)
    assert isinstance(pipe._residency, Residency)
