"""In float16 diffusers gives NaN where activations leave its range; zimage stays with float32, and without a retry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch

from zimage import denoiser

if TYPE_CHECKING:
    from conftest import Pairs

RECIPES: dict[str, dict[str, Any]] = {
    "turbo": {"steps": 8, "guidance": 0.0},
    "base": {"steps": 8, "guidance": 4.0, "negative_prompt": "blurry, low quality"},
}


@pytest.fixture(autouse=True)
def no_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a step was not finite in float16 and was taken again in float32")

    monkeypatch.setattr(denoiser, "_float32_velocity", refuse)


@pytest.mark.parametrize("variant", RECIPES)
@pytest.mark.parametrize("activations", ["sane", "large"])
def test_latents_are_those_of_float32(
    pairs: Pairs, variant: Literal["base", "turbo"], activations: Literal["sane", "large"]
) -> None:
    recipe = {"prompt": "a red fox in snow", "height": 256, "width": 256, "seed": 3, "any_size": True}
    options = {name: value for name, value in RECIPES[variant].items() if name == "negative_prompt"}
    options |= {"num_inference_steps": RECIPES[variant]["steps"], "guidance_scale": RECIPES[variant]["guidance"]}
    half, exact = (
        pairs(variant, dtype, "tiny", activations)
        .ours(**recipe, **options, output_type="latent", progress=False)
        .images
        for dtype in (torch.float16, torch.float32)
    )
    assert half.isfinite().all()
    assert (half - exact).norm() <= 1e-2 * exact.norm()
    assert (half - exact).abs().max() <= 1e-2 * exact.abs().max()


def test_diffusers_overflows(pairs: Pairs) -> None:
    """So the checkpoint with large activations has what the test above is about, and the sane one has not."""
    options = {"height": 256, "width": 256, "num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent"}
    large, sane = (
        pairs("turbo", torch.float16, "tiny", activations).theirs("a red fox in snow", **options).images
        for activations in ("large", "sane")
    )
    assert large.isnan().all()
    assert sane.isfinite().all()
