"""The way from diffusers and back: the same modules, no copy, and pipelines on both sides that go on working."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch

from zimage import CheckpointError, RequestError, ZImagePipeline

if TYPE_CHECKING:
    from conftest import Pair, Pairs

CALL: dict[str, Any] = {"height": 80, "width": 112, "num_inference_steps": 3, "output_type": "latent"}
PROMPT = "a photo of a red fox sitting in the snow"


@pytest.fixture
def pair(pairs: Pairs) -> Pair:
    return pairs("base")


def diffusers_latents(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipeline(PROMPT, guidance_scale=4.0, negative_prompt="blurry", generator=generator, **CALL).images


def storage(module: torch.nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in module.named_parameters()}


def test_from_diffusers_shares_every_weight(pair: Pair) -> None:
    ours = ZImagePipeline.from_diffusers(pair.theirs)
    assert ours.variant.name == "base"
    assert storage(ours.transformer) == storage(pair.theirs.transformer)
    assert storage(ours.autoencoder.vae) == storage(pair.theirs.vae)
    theirs = storage(pair.theirs.text_encoder)
    mine = storage(ours.text_encoder.model)
    assert mine.items() <= theirs.items()
    unread = {name for name in theirs if name.startswith("layers.2.") or name == "norm.weight"}
    assert theirs.keys() - mine.keys() == unread


def test_from_diffusers_gives_its_latents_and_leaves_it_as_it_was(pair: Pair) -> None:
    before = diffusers_latents(pair.theirs)
    ours = ZImagePipeline.from_diffusers(pair.theirs)
    made = ours(PROMPT, guidance_scale=4.0, negative_prompt="blurry", seed=3, any_size=True, progress=False, **CALL)
    assert (made.images - before).abs().max() <= 1e-5 * before.abs().max()
    assert torch.equal(diffusers_latents(pair.theirs), before)
    assert type(pair.theirs.transformer) is diffusers.ZImageTransformer2DModel
    assert len(pair.theirs.text_encoder.layers) == pair.theirs.text_encoder.config.num_hidden_layers == 3


def test_from_diffusers_with_another_shift_asks_for_the_variant(pair: Pair) -> None:
    shifted = copy.copy(pair.theirs)
    shifted.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=4.5)
    with pytest.raises(CheckpointError, match="variant='base' or variant='turbo'"):
        ZImagePipeline.from_diffusers(shifted)
    ours = ZImagePipeline.from_diffusers(shifted, variant="base")
    theirs = diffusers_latents(shifted)
    made = ours(PROMPT, guidance_scale=4.0, negative_prompt="blurry", seed=3, any_size=True, progress=False, **CALL)
    assert (made.images - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_from_diffusers_refuses_what_is_incomplete() -> None:
    with pytest.raises(CheckpointError, match="no scheduler, vae, text_encoder, tokenizer, transformer"):
        ZImagePipeline.from_diffusers(object())


def test_to_diffusers_shares_and_agrees(pair: Pair) -> None:
    theirs = pair.ours.to_diffusers()
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(theirs, diffusers.ZImagePipeline)
    assert storage(theirs.transformer) == storage(pair.ours.transformer)
    assert storage(theirs.vae) == storage(pair.ours.autoencoder.vae)
    assert storage(theirs.text_encoder) == storage(pair.ours.text_encoder.model)
    original = diffusers_latents(pair.theirs)
    assert (diffusers_latents(theirs) - original).abs().max() <= 1e-6 * original.abs().max()


def test_to_diffusers_of_what_came_from_diffusers(pair: Pair) -> None:
    """Three models over the same layers, used in turn: what one of them records is not another's."""
    original = diffusers_latents(pair.theirs)
    other = ZImagePipeline.from_diffusers(pair.theirs).to_diffusers()
    other.set_progress_bar_config(disable=True)
    for pipeline in (other, pair.theirs, ZImagePipeline.from_diffusers(other).to_diffusers(), other):
        assert (diffusers_latents(pipeline) - original).abs().max() <= 1e-6 * original.abs().max()


def test_what_lacks_a_layer_is_not_saved_by_diffusers(pair: Pair, tmp_path: Path) -> None:
    """Its files would be read as those of a model with a layer less. zimage saves it whole."""
    theirs = pair.ours.to_diffusers()
    for owner in (theirs, theirs.text_encoder):
        with pytest.raises(RequestError, match=r"from_diffusers\(pipeline\).save_pretrained\(folder\)"):
            owner.save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    ZImagePipeline.from_diffusers(theirs).save_pretrained(tmp_path / "ours")
    again = diffusers.ZImagePipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    original = diffusers_latents(pair.theirs)
    assert (diffusers_latents(again) - original).abs().max() <= 1e-6 * original.abs().max()


def test_a_transformer_that_diffusers_saves_is_its_own(pair: Pair, tmp_path: Path) -> None:
    pair.ours.to_diffusers().transformer.save_pretrained(tmp_path)
    again = diffusers.AutoModel.from_pretrained(str(tmp_path))
    assert type(again) is diffusers.ZImageTransformer2DModel
    saved = pair.ours.transformer.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.state_dict().items())


def test_there_and_back(pair: Pair) -> None:
    back = ZImagePipeline.from_diffusers(pair.ours.to_diffusers())
    assert back.transformer is pair.ours.transformer
    assert storage(back.text_encoder.model) == storage(pair.ours.text_encoder.model)
    again, first = (
        pipeline(PROMPT, guidance_scale=4.0, seed=3, any_size=True, progress=False, **CALL).images
        for pipeline in (back, pair.ours)
    )
    assert torch.equal(again, first)


def test_inherited_forward(pair: Pair) -> None:
    """Training and control code written for diffusers calls `forward` with lists."""
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(16, 1, 10, 14, generator=generator) for _ in range(2)]
    times = torch.tensor([0.2, 0.7])
    with torch.no_grad():
        ours, theirs = (
            transformer(latents, times, pair.embeds(20, 40), return_dict=False)[0]
            for transformer in (pair.ours.transformer, pair.theirs.transformer)
        )
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
