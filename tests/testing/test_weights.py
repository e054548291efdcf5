from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file

from zimage.testing import build_checkpoint

PROMPT = "a red fox in snow"
OTHER_PROMPT = "an oil portrait of a woman with silver hair, warm colours"
LATENTS = (1, 16, 32, 32)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    loader: Any = ZImagePipeline
    pipe = loader.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> Any:
    return load(tiny)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("checkpoints") / "large", activations="large")


def noise(seed: int) -> torch.Tensor:
    return torch.randn(LATENTS, generator=torch.Generator().manual_seed(seed))


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())


def features(pipe: Any, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        encoded: torch.Tensor = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0]
    return encoded


def predict(pipe: Any, latents: torch.Tensor, time: float, caption: torch.Tensor) -> torch.Tensor:
    images = [latents[0].unsqueeze(1)]
    with torch.no_grad():
        out: torch.Tensor = pipe.transformer(images, torch.tensor([time]), [caption], return_dict=False)[0][0]
    return out[:, 0]


def generate(pipe: Any, latents: torch.Tensor, **options: Any) -> Any:
    side = 8 * latents.shape[-1]
    arguments = {"num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "latent", **options}
    return pipe(PROMPT, height=side, width=side, latents=latents, **arguments).images


@contextmanager
def hidden_maxima(transformer: torch.nn.Module) -> Iterator[dict[str, float]]:
    """Collects the largest |silu(w1 x) * w3 x| of each block."""
    maxima: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            maxima[name] = max(maxima.get(name, 0.0), float(arguments[0].abs().max()))

        return hook

    named = [(name, module) for name, module in transformer.named_modules() if name.endswith("feed_forward.w2")]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in named]
    yield maxima
    for handle in handles:
        handle.remove()


def test_no_tensor_is_constant_and_norms_are_near_one(tiny: Path) -> None:
    for file in tiny.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert tensor.std() > 1e-3, name
            if "norm" in name and name.endswith("weight"):
                centre = 1.5 if "norm_q" in name or "norm_k" in name else 1.0
                assert abs(tensor.mean() - centre) < 0.12, name
                assert tensor.std() < 0.15, name


def test_features_are_of_order_one_and_tell_prompts_apart(pipe: Any) -> None:
    fox, portrait = features(pipe, PROMPT), features(pipe, OTHER_PROMPT)
    assert 0.5 < rms(fox) < 2
    assert 0.5 < rms(portrait) < 2
    assert rms(fox[-1] - portrait[-1]) / rms(fox[-1]) > 0.2
    assert rms(fox[8] - portrait[8]) / rms(fox[8]) > 0.5


@pytest.mark.parametrize("time", [0.0, 0.25, 0.9])
def test_predictions_are_of_order_one(pipe: Any, time: float) -> None:
    assert 0.3 < rms(predict(pipe, noise(0), time, features(pipe, PROMPT))) < 3


def test_predictions_depend_on_caption_time_seed_and_position(pipe: Any) -> None:
    caption = features(pipe, PROMPT)
    reference = predict(pipe, noise(0), 0.25, caption)

    def change(out: torch.Tensor) -> float:
        return rms(out - reference) / rms(reference)

    assert 0.05 < change(predict(pipe, noise(0), 0.25, features(pipe, OTHER_PROMPT))) < 1
    assert 0.05 < change(predict(pipe, noise(0), 0.25, features(pipe, "a red fox in rain"))) < 1
    assert 0.05 < change(predict(pipe, noise(0), 0.25, features(pipe, ""))) < 1
    assert 0.05 < change(predict(pipe, noise(0), 0.35, caption)) < 1
    assert 0.5 < change(predict(pipe, noise(1), 0.25, caption)) < 2
    moved = predict(pipe, noise(0).roll(2, dims=-1), 0.25, caption)
    assert 0.05 < change(moved.roll(-2, dims=-1)) < 1


def test_diffusers_makes_a_picture(pipe: Any) -> None:
    latents = generate(pipe, noise(0))
    assert latents.shape == LATENTS
    assert 0.5 < rms(latents) < 2
    assert rms(latents - noise(0)) > 0.3
    pixels = generate(pipe, noise(0), output_type="np")[0]
    assert pixels.shape == (256, 256, 3)
    assert pixels.std() > 0.1
    assert 0.3 < pixels.mean() < 0.7
    assert ((pixels == 0) | (pixels == 1)).mean() < 0.05


def test_the_encoder_gives_narrow_latents_of_order_one(pipe: Any) -> None:
    pixels = torch.rand((1, 3, 128, 128), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    scaled = (posterior.mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert 0.3 < rms(scaled) < 3
    assert 0 < posterior.std.max() < 1


def test_a_small_perturbation_stays_small_under_guidance(pipe: Any) -> None:
    guided = {"num_inference_steps": 8, "guidance_scale": 4.0, "negative_prompt": "blurry"}
    disturbed = generate(pipe, noise(0) + 1e-3 * noise(1), **guided)
    assert 0 < rms(disturbed - generate(pipe, noise(0), **guided)) < 4e-3


def test_large_activations_pass_the_end_of_float16_in_every_block(tiny: Path, large: Path, pipe: Any) -> None:
    wild = load(large)
    for prompt in (PROMPT, OTHER_PROMPT, ""):
        for time in (0.0, 0.5):
            with hidden_maxima(wild.transformer) as maxima:
                out = predict(wild, noise(0), time, features(wild, prompt))
            assert len(maxima) == 6
            assert all(7e4 < value < 1e6 for value in maxima.values()), maxima
            with hidden_maxima(pipe.transformer) as maxima:
                sane = predict(pipe, noise(0), time, features(pipe, prompt))
            assert all(value < 100 for value in maxima.values()), maxima
            assert 0.8 < rms(out) / rms(sane) < 1.25


def test_large_weights_are_the_sane_ones_times_a_power_of_two(tiny: Path, large: Path) -> None:
    file = "transformer/diffusion_pytorch_model.safetensors"
    sane, wild = load_file(tiny / file), load_file(large / file)
    for name, tensor in sane.items():
        factor = 128.0 if "feed_forward.w1" in name or "feed_forward.w3" in name else 1.0
        factor *= 2.0 if name.startswith("context_refiner") and "feed_forward.w3" in name else 1.0
        assert torch.equal(wild[name], tensor * factor), name


@pytest.mark.parametrize(("activations", "finite"), [("sane", True), ("large", False)])
def test_diffusers_in_float16_fails_on_large_activations_alone(
    tiny: Path, large: Path, activations: str, finite: bool
) -> None:
    pipe = load(large if activations == "large" else tiny, torch.float16)
    latents = generate(pipe, noise(0)[..., :8, :8])
    assert bool(latents.isfinite().all()) is finite
    assert bool(latents.isnan().any()) is not finite
