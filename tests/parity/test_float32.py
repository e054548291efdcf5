"""In float32 a call gives the latents of diffusers' pipeline to 1e-5 of the largest, whatever the arguments.

The two differ in order of summation only: diffusers batches the images and both branches of guidance, and pads and
masks captions of unequal length; zimage runs each alone.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zimage import ZImageWarning

if TYPE_CHECKING:
    from conftest import Pair, Pairs

TOLERANCE = 1e-5

# Height, width, image tokens: the last two in neither case a multiple of 32 and so filled with pad tokens.
SIZES = ((128, 256, 128), (80, 112, 35), (240, 176, 165))

GUIDANCE: tuple[dict[str, Any], ...] = (
    {"guidance": 0.0},
    *(
        {"guidance": guidance, "cfg_normalization": normalization, "cfg_truncation": truncation}
        for guidance, normalization, truncation in product((0.7, 4.0), (False, True, 0.7), (1.0, 0.6))
    ),
)
# Shifted to 1, 0.86, 0.4 and 0.24: model times 0, 0.14, 0.6 and 0.76, of which truncation at 0.6 stops the last or two.
SIGMAS = [1.0, 0.5, 0.1, 0.05]

SHORT = "a cat"
ENGLISH = "a photo of a red fox sitting in the snow, soft morning light"
CHINESE = "一只红色的狐狸坐在雪地里，清晨柔和的光线"
LONG = f"{ENGLISH}, {ENGLISH}, {ENGLISH}"
OVER_LONG = "a red fox in the snow, " * 70 + "and the very end"


@pytest.fixture
def pair(pairs: Pairs) -> Pair:
    return pairs("base")


@pytest.mark.parametrize(("height", "width", "tokens"), SIZES)
@pytest.mark.parametrize("guidance", GUIDANCE, ids=lambda options: "-".join(map(str, options.values())))
def test_sizes_and_guidance(pair: Pair, height: int, width: int, tokens: int, guidance: dict[str, Any]) -> None:
    assert tokens == (height // 16) * (width // 16)
    negative = {"negative_prompt": CHINESE} if guidance["guidance"] else {}
    outcome = pair.run(ENGLISH, height=height, width=width, steps=4, sigmas=SIGMAS, **guidance, **negative)
    assert outcome.error <= TOLERANCE


@pytest.mark.parametrize("prompt", [ENGLISH, CHINESE, "", LONG], ids=["english", "chinese", "empty", "long"])
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_prompts(pair: Pair, prompt: str, guidance: float) -> None:
    assert pair.run(prompt, guidance=guidance).error <= TOLERANCE


@pytest.mark.parametrize(
    ("negative", "longer", "same_padding"),
    [("", -1, True), ("a fox", 0, True), ("blurry, low", 1, True), (LONG, 1, False)],
    ids=["shorter", "equal", "longer", "longer-padding"],
)
@pytest.mark.parametrize("size", [(80, 112), (128, 128)], ids=str)
def test_negative_prompts(pair: Pair, negative: str, longer: int, same_padding: bool, size: tuple[int, int]) -> None:
    prompt_tokens, negative_tokens = pair.tokens(SHORT), pair.tokens(negative)
    assert (negative_tokens > prompt_tokens) - (negative_tokens < prompt_tokens) == longer
    assert (-(-prompt_tokens // 32) == -(-negative_tokens // 32)) == same_padding
    outcome = pair.run(SHORT, negative_prompt=negative, guidance=4.0, height=size[0], width=size[1])
    assert outcome.error <= TOLERANCE


def test_negative_prompt_shorter_by_a_whole_padding(pair: Pair) -> None:
    assert pair.tokens(LONG) > 64
    assert pair.run(LONG, negative_prompt="blurry", guidance=4.0).error <= TOLERANCE


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_over_long_prompt_is_cut_at_the_same_token_and_said(pair: Pair, guidance: float) -> None:
    assert pair.tokens(OVER_LONG) > 512
    with pytest.warns(ZImageWarning, match="cut off: '.*and the very end'"):
        outcome = pair.run(OVER_LONG, guidance=guidance)
    assert outcome.error <= TOLERANCE


@pytest.mark.parametrize("guidance", [0.0, 4.0])
@pytest.mark.parametrize("images", [2, 3])
def test_several_images_of_a_prompt(pair: Pair, images: int, guidance: float) -> None:
    outcome = pair.run(ENGLISH, num_images_per_prompt=images, guidance=guidance)
    assert len(outcome.ours) == images
    assert outcome.error <= TOLERANCE


@pytest.mark.parametrize("images", [1, 2])
def test_lists_of_prompts_and_negative_prompts(pair: Pair, images: int) -> None:
    prompts, negatives = [ENGLISH, "", LONG], [LONG, "blurry", CHINESE]
    plain = pair.run(prompts, num_images_per_prompt=images)
    guided = pair.run(prompts, negative_prompt=negatives, num_images_per_prompt=images, guidance=4.0)
    assert len(plain.ours) == len(guided.ours) == 3 * images
    assert plain.error <= TOLERANCE
    assert guided.error <= TOLERANCE
    assert prompts == [ENGLISH, "", LONG]


@pytest.mark.parametrize("sigmas", [[1.0], [0.6, 0.3], [0.999, 0.5, 0.2, 0.01, 0.001]], ids=len)
def test_given_sigmas(pair: Pair, sigmas: list[float]) -> None:
    assert pair.run(ENGLISH, sigmas=sigmas, steps=len(sigmas), guidance=4.0).error <= TOLERANCE


def test_given_latents(pair: Pair) -> None:
    latents = torch.randn(2, 16, 10, 14, generator=torch.Generator().manual_seed(1))
    untouched = latents.clone()
    assert pair.run([ENGLISH, CHINESE], latents=latents, guidance=4.0).error <= TOLERANCE
    assert torch.equal(latents, untouched)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 32), (32, 33), (64, 20), (97, 300)], ids=str)
def test_given_caption_features(pair: Pair, lengths: tuple[int, int]) -> None:
    positive, negative = pair.embeds(*lengths)
    plain = pair.run(prompt_embeds=[positive])
    guided = pair.run(prompt_embeds=[positive], negative_prompt_embeds=[negative], guidance=4.0)
    assert plain.error <= TOLERANCE
    assert guided.error <= TOLERANCE


def test_one_generator_for_all_images(pair: Pair) -> None:
    options: dict[str, Any] = {"num_images_per_prompt": 2, "height": 80, "width": 112, "output_type": "latent"}
    options |= {"num_inference_steps": 2, "guidance_scale": 0.0}
    ours = pair.ours(SHORT, generator=torch.Generator().manual_seed(9), any_size=True, progress=False, **options)
    theirs = pair.theirs(SHORT, generator=torch.Generator().manual_seed(9), **options)
    torch.testing.assert_close(ours.images, theirs.images, rtol=0, atol=TOLERANCE * theirs.images.abs().max().item())


@pytest.mark.parametrize("steps", [1, 8])
def test_turbo_recipe(pairs: Pairs, steps: int) -> None:
    assert pairs("turbo").run(ENGLISH, height=256, width=256, steps=steps).error <= TOLERANCE


def test_max_sequence_length(pair: Pair) -> None:
    with pytest.warns(ZImageWarning, match="max_sequence_length is 20"):
        assert pair.run(ENGLISH, max_sequence_length=20).error <= TOLERANCE


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_pixels(pair: Pair, guidance: float) -> None:
    floats = pair.run([SHORT, CHINESE], guidance=guidance, output_type="np")
    assert floats.ours.shape == (2, 80, 112, 3)
    assert (floats.ours - floats.theirs).abs().max() <= 1e-4
    bytes_ = pair.run([SHORT, CHINESE], guidance=guidance, output_type="pil")
    assert bytes_.ours.shape == (2, 80, 112, 3)
    assert (bytes_.ours - bytes_.theirs).abs().max() <= 1


@pytest.mark.parametrize("guidance", [0.0, 0.7, 4.0])
def test_more_and_wider_layers(pairs: Pairs, guidance: float) -> None:
    """`small`: 3 layers of 768. Guidance weighs the rounding of its two branches by 1 + g and g: by 6.4 for g = 4."""
    outcome = pairs("base", size="small").run(ENGLISH, height=128, width=128, steps=2, guidance=guidance)
    assert outcome.error <= TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a photo of a red fox sitting in the snow, soft morning lights"},
        {"negative_prompt": "x"},
        {"seed": 4},
        {"steps": 4},
        {"guidance": 3.9},
        {"cfg_normalization": 0.5},
        {"cfg_truncation": 0.1},
        {"sigmas": [1.0, 0.66, 0.33]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_tolerance_would_show_a_difference(pair: Pair, change: dict[str, Any]) -> None:
    """Every argument changes these latents by far more than the tolerance, so agreement above means something."""
    asked: dict[str, Any] = {"prompt": ENGLISH, "guidance": 4.0}
    outcome = pair.run(**asked)
    changed = pair.run(**{**asked, **change})
    assert (changed.ours - outcome.ours).abs().max() > 300 * TOLERANCE * outcome.ours.abs().max()
