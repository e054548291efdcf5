"""The same request gives the same bits: alone or in company, sooner or later, in another process, in any thread."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zimage import GenerationRequest, ZImagePipeline, convert_checkpoint
from zimage.files.recipe import pixel_digest
from zimage.testing import build_checkpoint
from zimage.testing.configs import SIZES

THREADS, CALLS = 8, 4000
pytestmark = pytest.mark.no_cover  # every line is counted in other tests; here that takes a third of the time
TINY: dict[str, Any] = {"height": 32, "width": 32, "any_size": True, "num_inference_steps": 1}


def digests(pipe: ZImagePipeline, *given: Any, **options: Any) -> list[str]:
    return [pixel_digest(image) for image in pipe(*given, **options).images]


@pytest.fixture(params=["turbo", "base"])
def pipe(request: pytest.FixtureRequest) -> ZImagePipeline:
    found: ZImagePipeline = request.getfixturevalue(request.param)
    return found


def test_a_picture_does_not_depend_on_its_company(pipe: ZImagePipeline, small: dict[str, Any]) -> None:
    texts = ["a fox", "a long-haired cat on a red sofa by the window", "", "狐狸 🦊"]
    alone = {text: digests(pipe, text, **small, seed=11) for text in texts}
    assert len({*map(tuple, alone.values())}) == 4
    together = digests(pipe, texts, **small, seed=[11] * 4)
    assert together == [alone[text][0] for text in texts]
    backwards = digests(pipe, texts[::-1], **small, seed=[11] * 4)
    assert backwards == together[::-1]


def test_a_picture_does_not_depend_on_how_many_are_asked_for(pipe: ZImagePipeline, small: dict[str, Any]) -> None:
    seven = digests(pipe, "a fox", **small, seed=100, num_images_per_prompt=7)
    assert len(set(seven)) == 7
    assert digests(pipe, "a fox", **small, seed=103, num_images_per_prompt=2) == seven[3:5]
    assert digests(pipe, ["a cat", "a fox"], **small, seed=103, num_images_per_prompt=1)[1:] == seven[4:5]


def test_a_picture_does_not_depend_on_other_requests_of_the_call(base: ZImagePipeline, small: dict[str, Any]) -> None:
    """Pictures of one call share captions, positions and noise levels; each is as if it had its own."""
    requests = [
        GenerationRequest("a fox", **{**small, **options}, seed=5)
        for options in (
            {},
            {"height": 96},
            {"num_inference_steps": 3},
            {"guidance_scale": 0},
            {"negative_prompt": "blurry"},
            {"sampler": "heun", "cfg_normalization": True},
            {"sigmas": [0.8, 0.3], "cfg_truncation": 0.1},
            {"width": 80},
            {"diversity": 1.0},
        )
    ]
    alone = [digests(base, request)[0] for request in requests]
    assert len(set(alone)) == len(requests)
    assert digests(base, requests) == alone
    assert digests(base, requests[::-1]) == alone[::-1]


def test_a_picture_is_the_same_after_a_hundred_others(own_turbo: ZImagePipeline, small: dict[str, Any]) -> None:
    first = digests(own_turbo, "a fox", **small, seed=7)
    torch.manual_seed(1)
    for index in range(100):
        own_turbo(f"picture {index}", 32, 32 + 16 * (index % 3), 1 + index % 2, any_size=True, seed=index)
    assert digests(own_turbo, "a fox", **small, seed=7) == first


def test_pictures_are_the_same_in_a_new_process(
    turbo: ZImagePipeline,
    base: ZImagePipeline,
    turbo_folder: Path,
    base_folder: Path,
    small: dict[str, Any],
    run_python: Callable[..., str],
) -> None:
    code = f"""
import sys, torch
torch.set_num_threads({torch.get_num_threads()})
from zimage import ZImagePipeline
from zimage.files.recipe import pixel_digest
for folder in sys.argv[1:]:
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")
    for image in pipe(["a cat", "a fox"], **{small!r}, seed=7, progress=False).images:
        print(pixel_digest(image))
"""
    printed = run_python(code, turbo_folder, base_folder).split()
    here = [digests(pipe, ["a cat", "a fox"], **small, seed=7) for pipe in (turbo, base)]
    assert printed == here[0] + here[1]


def test_loading_again_changes_nothing(base: ZImagePipeline, base_folder: Path, small: dict[str, Any]) -> None:
    again = ZImagePipeline.from_pretrained(base_folder, dtype="float32", device="cpu")
    assert digests(again, "a fox", **small, seed=7, progress=False) == digests(base, "a fox", **small, seed=7)


@pytest.fixture(params=[torch.float64, torch.bfloat16, "meta"], ids=str)
def other_defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch's default type or device as another library may have set it."""
    if isinstance(request.param, torch.dtype):
        torch.set_default_dtype(request.param)
    else:
        torch.set_default_device(request.param)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.fixture
def drawn_before(base: ZImagePipeline, small: dict[str, Any]) -> list[str]:
    return digests(base, "a fox", **small, seed=7) + digests(base, "a fox", **small, sigmas=[0.9, 0.3], seed=7)


def test_a_picture_does_not_depend_on_torchs_defaults(
    base: ZImagePipeline, small: dict[str, Any], drawn_before: list[str], other_defaults: None
) -> None:
    base.text_encoder.forget()
    generator = torch.Generator("cpu").manual_seed(7)
    now = digests(base, "a fox", **small, seed=7) + digests(base, "a fox", **small, sigmas=[0.9, 0.3], seed=7)
    assert now == drawn_before
    assert digests(base, "a fox", **small, generator=generator) == drawn_before[:1]


def test_models_and_adapters_are_read_and_written_whatever_torchs_defaults_are(
    base_folder: Path, small: dict[str, Any], drawn_before: list[str], other_defaults: None, tmp_path: Path
) -> None:
    """Files are read on the host, also where a notebook has said that tensors are made on a card."""
    convert_checkpoint(base_folder, file := tmp_path / "base.safetensors", dtype="float32")
    pipe = ZImagePipeline.from_pretrained(base_folder, transformer=file, dtype="float32", device="cpu")
    assert digests(pipe, "a fox", **small, seed=7) == drawn_before[:1]
    pipe.enable_sequential_cpu_offload()
    assert digests(pipe, "a fox", **small, seed=7) == drawn_before[:1]
    layer = "transformer.layers.0.attention.to_q"
    shapes = {f"{layer}.lora_A.weight": (2, 64), f"{layer}.lora_B.weight": (64, 2)}
    halves = {name: torch.ones(shape, dtype=torch.float32, device="cpu") for name, shape in shapes.items()}
    save_file(halves, tmp_path / "ink.safetensors")
    pipe.load_adapter(tmp_path / "ink.safetensors")
    assert digests(pipe, "a fox", **small, seed=7) != drawn_before[:1]
    pipe.save_adapter(tmp_path / "again.safetensors", "ink")
    ZImagePipeline.from_pretrained(base_folder, weight_dtype="int8", dtype="float32", device="cpu")


def test_a_picture_does_not_depend_on_inference_mode(own_turbo: ZImagePipeline, small: dict[str, Any]) -> None:
    with torch.inference_mode():
        inside = digests(own_turbo, "a fox", **small, seed=7)
    assert digests(own_turbo, "a fox", **small, seed=7) == inside
    with torch.inference_mode():
        assert digests(own_turbo, "a cat", **small, seed=7) != inside


def test_threads_take_turns_at_the_weights(
    own_turbo: ZImagePipeline, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that eight threads need the memory of one."""
    inside, most = 0, 0

    def alone(compute: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **options: Any) -> Any:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.002)
            try:
                return compute(*given, **options)
            finally:
                inside -= 1

        return watched

    for owner, name in (
        (own_turbo.transformer, "denoise"),
        (own_turbo.transformer, "encode_caption"),
        (own_turbo.text_encoder, "encode"),
        (own_turbo.autoencoder, "decode"),
    ):
        monkeypatch.setattr(owner, name, alone(getattr(owner, name)))
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda seed: own_turbo(f"{seed}", **small, seed=seed), range(12)))) == 12
    assert most == 1


@pytest.fixture(scope="module")
def least(tmp_path_factory: pytest.TempPathFactory) -> ZImagePipeline:
    """Of one layer of each kind, so that many calls take little time."""
    with pytest.MonkeyPatch.context() as patch:
        one = replace(SIZES["tiny"], n_layers=1, n_refiner_layers=1, text_layers=2, vae_layers=1)
        patch.setitem(SIZES, "tiny", one)
        folder = build_checkpoint(tmp_path_factory.mktemp("least") / "model", variant="base")
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def impatient_threads() -> Iterator[None]:
    """Python's threads take turns a hundred times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 100)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.long
@pytest.mark.usefixtures("impatient_threads")
def test_eight_threads_and_4000_calls_each_get_their_own_image(least: ZImagePipeline) -> None:
    """More prompts than the text cache holds, with and without guidance, in calls and streams."""
    requests = [
        GenerationRequest(
            f"picture {index}, a fox" + " and a cat" * (index % 4),
            **TINY,
            seed=index // 2,
            guidance_scale=(0.0, 2.0, 4.0)[index % 3],
            negative_prompt="blurry" if index % 6 == 5 else None,
        )
        for index in range(70)
    ]
    expected = [digests(least, request)[0] for request in requests]
    assert len(set(expected)) == len(requests)

    def work(thread: int) -> Counter[bool]:
        chooser = random.Random(thread)
        right: Counter[bool] = Counter()
        for call in range(CALLS // THREADS):
            index = chooser.randrange(len(requests))
            if call % 10:
                image = least(requests[index]).images[0]
            else:
                *_, last = least.stream(requests[index])
                image = last.image
            right[pixel_digest(image) == expected[index] and image.recipe.request.prompt == requests[index].prompt] += 1
        return right

    with ThreadPoolExecutor(THREADS) as pool:
        outcomes = sum(pool.map(work, range(THREADS)), Counter())
    assert outcomes == {True: CALLS}
