"""How often each part of the model runs for a call: the evaluations that the arguments ask for, and no other.

Counted where the weights are: calls of the last layer of all, and of the first layer's query projection in each of the
transformer's parts, which both branches of guidance share in pictures as small as these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zimage import denoiser

if TYPE_CHECKING:
    from conftest import Pair, Pairs

SHORT, SAME_PADDING = "a cat", "blurry"
LONGER = "a photo of a red fox sitting in the snow, soft morning light, shallow depth of field, 35mm film"
SIGMAS = [1.0, 0.5, 0.1, 0.05]  # model times 0, 0.14, 0.6 and 0.76 after the shift


@pytest.fixture
def pair(pairs: Pairs) -> Pair:
    return pairs("base")


@pytest.fixture
def calls(pair: Pair) -> Iterator[Counter[str]]:
    """Calls of each part since the test began. Parts are shared by none of the other tests' pipelines."""
    counted: Counter[str] = Counter()
    pair.ours.text_encoder.forget()
    transformer = pair.ours.transformer
    watched = {
        "evaluation": transformer.all_final_layer["2-1"].linear,
        "layers": transformer.layers[0].attention.to_q,
        "refinement": transformer.noise_refiner[0].attention.to_q,
        "caption": transformer.context_refiner[0].attention.to_q,
        "text": pair.ours.text_encoder.model.embed_tokens,
        "modulation": transformer.layers[0].adaLN_modulation,
        "decoding": pair.ours.autoencoder.vae.decoder.conv_in,
    }

    def counter(name: str) -> Callable[..., None]:
        return lambda *_: counted.update([name])

    handles = [module.register_forward_hook(counter(name)) for name, module in watched.items()]
    yield counted
    for handle in handles:
        handle.remove()


def generate(pair: Pair, prompt: str | list[str] = SHORT, **options: Any) -> None:
    size = {"height": 80, "width": 112, "any_size": True}
    pair.ours(prompt, seed=1, progress=False, **{"output_type": "latent", "guidance_scale": 0.0, **size, **options})


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_one_evaluation_a_step_without_guidance(pair: Pair, calls: Counter[str], steps: int) -> None:
    generate(pair, num_inference_steps=steps, output_type="pil")
    assert calls == {
        "evaluation": steps,
        "layers": steps,
        "refinement": steps,
        "caption": 1,
        "text": 1,
        "modulation": 1,
        "decoding": 1,
    }


@pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])
@pytest.mark.parametrize(("negative", "same_padding"), [(SAME_PADDING, True), (LONGER, False)], ids=["same", "longer"])
def test_two_evaluations_a_step_with_guidance(
    pair: Pair,
    calls: Counter[str],
    negative: str,
    same_padding: bool,
    together: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Captions of one padded length share what happens to the image tokens before they meet a caption."""
    assert (pair.tokens(negative) <= 32) == same_padding
    if not together:
        monkeypatch.setattr(denoiser, "TOGETHER", 0)
    generate(pair, negative_prompt=negative, num_inference_steps=4, guidance_scale=4.0)
    assert calls == {
        "evaluation": 8,
        "layers": 4 if together else 8,
        "refinement": 4 if together or same_padding else 8,
        "caption": 2,
        "text": 2,
        "modulation": 1,
    }


@pytest.mark.parametrize(("truncation", "guided"), [(1.0, 4), (0.7, 3), (0.5, 2), (0.1, 1), (0.0, 1)])
def test_truncated_steps_take_one(pair: Pair, calls: Counter[str], truncation: float, guided: int) -> None:
    generate(pair, sigmas=SIGMAS, guidance_scale=4.0, cfg_truncation=truncation)
    assert calls["evaluation"] == 4 + guided


def test_truncation_at_a_step_to_the_last_bit(pair: Pair, calls: Counter[str]) -> None:
    """A step at exactly the truncation is guided, here and in diffusers: `time > truncation` turns guidance off."""
    shifted = 6 * torch.tensor(0.1) / (1 + 5 * torch.tensor(0.1))
    at = ((1000 - shifted * 1000) / 1000).item()
    below = torch.tensor(at).nextafter(torch.tensor(0.0)).item()
    counted = []
    hook = pair.theirs.transformer.layers[0].attention.to_q.register_forward_hook(
        lambda module, inputs, output: counted.append(len(output))
    )
    try:
        for truncation, evaluations in ((at, 7), (below, 6)):
            calls.clear()
            counted.clear()
            outcome = pair.run(SHORT, sigmas=SIGMAS, steps=4, guidance=4.0, cfg_truncation=truncation)
            assert outcome.error <= 1e-5
            assert calls["evaluation"] == sum(counted) == evaluations
    finally:
        hook.remove()


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 4), ("heun", 7), ("dpmpp_2m", 4)])
def test_samplers(pair: Pair, calls: Counter[str], sampler: str, evaluations: int) -> None:
    generate(pair, num_inference_steps=4, sampler=sampler)
    assert calls["evaluation"] == calls["refinement"] == evaluations


def test_each_prompt_is_encoded_once_a_call(pair: Pair, calls: Counter[str]) -> None:
    options: dict[str, Any] = {"num_images_per_prompt": 2, "guidance_scale": 4.0, "num_inference_steps": 2}
    prompts = [SHORT, LONGER, SHORT]
    generate(pair, prompts, negative_prompt=[SAME_PADDING, SAME_PADDING, LONGER], **options)
    assert calls["text"] == calls["caption"] == 3
    assert calls["evaluation"] == 6 * 2 * 2
    assert calls["modulation"] == 1
    generate(pair, prompts, **options)
    assert calls["text"] == 4, "only the empty negative prompt is new; the others' features are cached"
    assert calls["caption"] == 3 + 3
