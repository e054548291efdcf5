"""What must hold of CUDA graphs on CUDA: the bits of what is launched piece by piece, few launches, moving weights."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage import GenerationRequest, ZImagePipeline
from zimage.kernels.switch import using
from zimage.models.graphs import use_graphs, uses_graphs
from zimage.testing import build_checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("gpu") / "base", size="small", variant="base")


def latents(pipe: ZImagePipeline, prompt: str = "a fox", side: int = 256, seed: int = 1, steps: int = 3) -> Tensor:
    options: dict[str, Any] = {"negative_prompt": "blurry " * 40, "num_inference_steps": steps, "progress": False}
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
    names = {key[0] for key in vars(pipe.transformer)["refine"].__self__._kept}
    assert names >= {"refine_together", "denoise_together"}
    assert "denoise" not in names  # which is for pictures of one branch


def test_compiled_blocks_are_recorded_too(folder: Path) -> None:
    with using("off"):
        pipe = ZImagePipeline.from_pretrained(folder, device="cuda").compile()
        expected = latents(pipe)
        assert pipe.compiled
        pipe.compile(cuda_graphs=True)
        assert torch.equal(latents(pipe), expected)
    assert vars(pipe.transformer)["refine"].__self__._kept


def test_a_forward_is_no_launch_of_its_own(folder: Path, launches: list[str]) -> None:
    """Of kernels that are started one by one, more steps take no more."""
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda")

    def started(steps: int) -> int:
        latents(pipe, steps=steps)
        launches.clear()
        latents(pipe, steps=steps)
        return len(launches)

    blocks = len(pipe.transformer.noise_refiner) + len(pipe.transformer.layers)
    assert started(3) >= started(1) + 2 * 5 * blocks
    use_graphs(pipe.transformer)
    assert started(3) == started(1)


def test_kernels_go_on_where_blocks_could_be_compiled(folder: Path, launches: list[str]) -> None:
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda")
    expected = latents(pipe)
    launches.clear()
    assert torch.equal(latents(pipe.compile()), expected)
    assert not pipe.compiled
    assert launches.count("rotate_heads") >= 3 * len(pipe.transformer.layers)


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


def test_recordings_are_made_again_once_memory_was_given_back(folder: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16")
    expected = latents(pipe)
    pipe.compile(cuda_graphs=True)
    for _ in range(3):
        pipe.text_encoder.forget()
        assert torch.equal(latents(pipe), expected)
        pipe._forget_graphs()
        torch.cuda.empty_cache()
    assert uses_graphs(pipe.transformer)


def test_threads_on_streams_of_their_own_get_their_own_pictures(folder: Path) -> None:
    """What is replayed for one may still compute while another's begins."""
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16")
    prompts = ["a fox", "two cats", "an owl", "three red boats"]
    expected = [latents(pipe, prompt) for prompt in prompts]
    pipe.compile(cuda_graphs=True)

    def work(number: int) -> list[bool]:
        right = []
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(20):
                pipe.text_encoder.forget()
                which = (number + turn) % len(prompts)
                made = latents(pipe, prompts[which])
                torch.cuda.current_stream().synchronize()
                right.append(torch.equal(made, expected[which]))
        return right

    with ThreadPoolExecutor(2) as pool:
        assert all(all(right) for right in pool.map(work, range(2)))


def test_a_pipeline_that_is_closed_takes_nothing_from_another(folder: Path) -> None:
    """Not what cuBLAS works in, which a graph has by its address."""
    first, second = (ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16") for _ in range(2))
    expected = latents(second)
    for pipe in (first, second):
        pipe.compile(cuda_graphs=True).text_encoder.forget()
        latents(pipe)
    first.close()
    elsewhere = torch.full((2**28,), 7, dtype=torch.int32, device="cuda")  # where the memory of the first was, if freed
    for _ in range(3):
        second.text_encoder.forget()
        assert torch.equal(latents(second), expected)
    assert (elsewhere == 7).all()


def test_four_bits_are_recorded_too(folder: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16", weight_dtype="nf4")
    expected = latents(pipe)
    pipe.compile(cuda_graphs=True).text_encoder.forget()
    for _ in range(2):
        assert torch.equal(latents(pipe), expected)
    assert vars(pipe.transformer)["refine"].__self__._kept


def test_prompts_without_kernels_are_left_to_the_model(folder: Path) -> None:
    with using("off"):
        pipe = ZImagePipeline.from_pretrained(folder, device="cuda")
        expected = latents(pipe)
        use_graphs(pipe.transformer)  # `compile` would have torch compile the blocks, where no kernels are
        pipe.text_encoder.use_graphs()
        for _ in range(2):
            pipe.text_encoder.forget()
            assert torch.equal(latents(pipe), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second card")
def test_a_model_on_another_card_is_recorded_there(folder: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda:1")
    expected = latents(pipe)
    pipe.compile(cuda_graphs=True).text_encoder.forget()
    for _ in range(2):
        assert torch.equal(latents(pipe), expected)


def test_prompts_are_recorded_too(folder: Path, launches: list[str]) -> None:
    """Of other lengths with the same recording; with its bits from a second stream as well."""
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16")
    prompts = ["a fox", "two cats in the snow", "an owl " * 30]

    def captions() -> list[Tensor]:
        pipe.text_encoder.forget()
        return [pipe.text_encoder.encode(pipe.text_encoder.tokenize(one, 512)) for one in prompts]

    expected = captions()
    pipe.compile(cuda_graphs=True)
    captions()
    launches.clear()
    for one, wanted in zip(captions(), expected, strict=True):
        assert torch.equal(one, wanted)
    assert launches == []
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        again = captions()
    side.synchronize()
    for one, wanted in zip(again, expected, strict=True):
        assert torch.equal(one, wanted)


def test_many_pictures_beside_each_other_are_recorded(folder: Path) -> None:
    requests = [
        GenerationRequest(f"picture {number} of a fox", seed=number, height=256, width=256, num_inference_steps=2)
        for number in range(4)
    ]
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16")
    expected = [one.image.tobytes() for one in pipe.generate_many(requests, progress=False)]
    pipe.compile(cuda_graphs=True)
    for _ in range(2):
        pipe.text_encoder.forget()
        assert [one.image.tobytes() for one in pipe.generate_many(requests, progress=False)] == expected
