"""What must hold of CUDA graphs on CUDA: the bits of what is launched piece by piece, few launches, moving weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage import ZImagePipeline
from zimage.models.graphs import use_graphs
from zimage.testing import build_checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("gpu") / "base", size="small", variant="base")


def latents(pipe: ZImagePipeline, prompt: str = "a fox", side: int = 256, seed: int = 1) -> Tensor:
    options: dict[str, Any] = {"negative_prompt": "blurry " * 40, "num_inference_steps": 3, "progress": False}
    made = pipe(prompt, height=side, width=side, any_size=True, seed=seed, output_type="latent", **options).images
    return made[0]  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pictures_have_the_same_bits(folder: Path, dtype: str) -> None:
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype=dtype)
    work = [("a fox", 256, 1), ("two cats " * 30, 256, 2), ("a fox", 128, 3), ("an owl", 256, 4)]
    expected = [latents(pipe, *one) for one in work]
    use_graphs(pipe.transformer)
    for one, wanted in zip(work * 2, expected * 2, strict=True):
        assert torch.equal(latents(pipe, *one), wanted)


def test_compiled_blocks_are_recorded_too(folder: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda").compile()
    expected = latents(pipe)
    pipe.compile(cuda_graphs=True)
    assert torch.equal(latents(pipe), expected)
    assert vars(pipe.transformer)["refine"].__self__._kept


def launches(compute: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compute()
    return sum(one.count for one in profile.key_averages() if "LaunchKernel" in one.key)


def test_a_forward_is_a_few_launches(folder: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda")
    latents(pipe)
    before = launches(lambda: latents(pipe))
    use_graphs(pipe.transformer)
    latents(pipe)
    assert launches(lambda: latents(pipe)) < before / 2


def test_weights_that_move_and_memory_that_is_given_back(folder: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda")
    expected = latents(pipe)
    use_graphs(pipe.transformer)
    assert torch.equal(latents(pipe), expected)
    pipe.enable_model_cpu_offload()
    assert torch.equal(latents(pipe), expected)
    pipe.uncompile()
    torch.cuda.synchronize()
    assert torch.equal(latents(pipe), expected)
