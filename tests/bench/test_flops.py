"""The operations counted from sizes are those that torch counts in a run, to the last one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zimage import ZImagePipeline
from zimage.bench import flops
from zimage.models.transformer import ROWS, ZImageTransformer
from zimage.testing.configs import SIZES, transformer_config, vae_config
from zimage.testing.weights import blank_module


def counted_picture(pipe: ZImagePipeline, lengths: list[int], **options: Any) -> int:
    """Operations of a call from caption features of these lengths to latents. In the mathematics, because torch does
    not count its own attention for CPUs."""
    features = [torch.randn(length, pipe.limits.caption_features) for length in lengths]
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), features, strict=False))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        pipe(**embeds, **options, any_size=True, seed=1, output_type="latent", progress=False)  # type: ignore[arg-type]
    return int(counter.get_total_flops())


def filling(config: Any, steps: int) -> int:
    """What is spent on noise levels that only fill up a product, and earns nothing."""
    return (ROWS - steps) * flops.noise_level_flops(config)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (80, 112)])
@pytest.mark.parametrize("steps", [1, 3])
def test_denoising(turbo: ZImagePipeline, height: int, width: int, steps: int) -> None:
    counted = counted_picture(turbo, [40], height=height, width=width, num_inference_steps=steps)
    tokens = height // 16 * (width // 16)
    config = turbo.transformer.config
    assert flops.denoising_flops(config, tokens, [40], steps) == counted - filling(config, steps)


@pytest.mark.parametrize("lengths", [[40, 33], [40, 12]], ids=["one padded length", "two padded lengths"])
def test_guidance_doubles_the_layers_and_no_shared_work(base: ZImagePipeline, lengths: list[int]) -> None:
    counted = counted_picture(base, lengths, height=64, width=64, num_inference_steps=2)
    config = base.transformer.config
    assert flops.denoising_flops(config, 16, lengths, 2) == counted - filling(config, 2)


@pytest.mark.parametrize(("size", "tera"), [("small", 0.2433), ("real", 56.58)])
def test_a_forward_of_the_larger_sizes(size: str, tera: float) -> None:
    """At 128 caption tokens; 1024² for the released size, 56.6 TFLOP. Counted without memory."""
    side = 128 if size == "real" else 64
    model = ZImageTransformer.share(blank_module("transformer", transformer_config(SIZES[size], "0")))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        modulation = model.modulations(torch.empty(1))[0]
        caption = model.encode_caption(torch.empty(128, model.config.cap_feat_dim))
        model.denoise(torch.empty(1, 16, side, side), caption, model.grid(side, side, 128), modulation)
    formula = flops.denoising_flops(model.config, (side // 2) ** 2, [128], 1)
    assert formula == counter.get_total_flops() - filling(model.config, 1)
    assert formula / 1e12 == pytest.approx(tera, rel=1e-2)


@pytest.mark.parametrize("tokens", [1, 37])
def test_encoding(turbo: ZImagePipeline, tokens: int) -> None:
    model = turbo.text_encoder.model
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=False)
    assert flops.encoding_flops(model.config, len(model.layers), tokens) == counter.get_total_flops()


def test_decoding(turbo: ZImagePipeline) -> None:
    """Counted without memory or in a run, the released size at 1024² being 8.9 TFLOP."""
    vae = turbo.autoencoder.vae
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        turbo.autoencoder.decode(torch.randn(1, 16, 8, 12))
    assert flops.decoding_flops(vae.config, 64, 96) == counter.get_total_flops()
    released = blank_module("vae", vae_config(SIZES["real"], "0")).config
    assert flops.decoding_flops(released, 1024, 1024) / 1e12 == pytest.approx(8.926, abs=0.001)


def test_tokens_are_filled_up_and_counted_as_the_square_in_attention() -> None:
    config = SimpleNamespace(dim=1)
    assert [flops.padded(tokens) for tokens in (1, 32, 33)] == [32, 32, 64]
    more = [flops.block_flops(config, tokens) for tokens in (1, 2, 3)]
    assert more[2] - 2 * more[1] + more[0] == 4 * 2
