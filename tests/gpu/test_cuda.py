"""What must hold on CUDA: no host synchronisation inside a step, the same bits for a seed, diffusers' numbers."""

from pathlib import Path

import diffusers
import pytest
import torch

from zimage import GenerationRequest, ZImagePipeline
from zimage.calls import tokenize
from zimage.denoiser import Conditioning, Preparation, make_velocity, schedule
from zimage.sampling.noise import seeded_noise
from zimage.sampling.samplers import SAMPLERS, sample
from zimage.testing import build_checkpoint

pytestmark = pytest.mark.gpu
OPTIONS = {"height": 256, "width": 272, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("gpu") / "base", size="tiny", variant="base")


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_step_never_waits_for_the_device(base_folder: Path, sampler: str) -> None:
    pipe = ZImagePipeline.from_pretrained(base_folder, device="cuda")
    request = pipe.resolve(
        GenerationRequest("a fox", negative_prompt="blurry", cfg_normalization=True, sampler=sampler, seed=1, **OPTIONS)
    )
    tokens = tokenize([request], pipe.text_encoder)
    features = [pipe.text_encoder.encode(tokens[text, 512]) for text in ("a fox", "blurry")]
    latents = seeded_noise(1, (1, 16, 32, 34)).cuda()
    with torch.no_grad():
        velocity = make_velocity(Preparation(pipe.transformer), request, Conditioning(*features))
        run = sample(SAMPLERS[sampler], velocity, latents, schedule(request).tolist())
        next(run)
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(3):
                next(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_same_bits_for_a_seed(base_folder: Path, dtype: str) -> None:
    pipe = ZImagePipeline.from_pretrained(base_folder, device="cuda", dtype=dtype)
    alone = pipe("a fox", seed=8, output_type="latent", progress=False, **OPTIONS).images
    among = pipe(["a cat", "a fox"], seed=[1, 8], output_type="latent", progress=False, **OPTIONS).images
    assert torch.equal(alone[0], among[1])


@pytest.mark.parametrize("guidance_scale", [0.0, 4.0])
def test_float32_equals_diffusers(base_folder: Path, guidance_scale: float) -> None:
    ours = ZImagePipeline.from_pretrained(base_folder, device="cuda", dtype="float32")
    theirs = diffusers.ZImagePipeline.from_pretrained(base_folder, dtype=torch.float32).to("cuda")
    theirs.set_progress_bar_config(disable=True)
    options = {**OPTIONS, "guidance_scale": guidance_scale, "output_type": "latent"}
    expected = theirs("a fox", generator=torch.Generator().manual_seed(8), **options).images
    latents = ours("a fox", seed=8, progress=False, **options).images
    assert ((latents - expected).abs().max() / expected.abs().max()).item() <= 1e-5


def test_float16_survives_large_activations(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "large", size="tiny", variant="turbo", activations="large")
    options = {**OPTIONS, "output_type": "latent", "seed": 8, "progress": False}
    half = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="float16")("a fox", **options).images
    full = ZImagePipeline.from_pretrained(folder, device="cuda", dtype="float32")("a fox", **options).images
    assert ((half - full).norm() / full.norm()).item() <= 1e-2


def test_loading_to_the_device_gives_the_files_weights(base_folder: Path) -> None:
    on_device = ZImagePipeline.from_pretrained(base_folder, device="cuda", dtype="bfloat16")
    on_host = ZImagePipeline.from_pretrained(base_folder, device="cpu", dtype="bfloat16")
    for name, tensor in on_host.transformer.state_dict().items():
        assert torch.equal(on_device.transformer.state_dict()[name].cpu(), tensor), name
