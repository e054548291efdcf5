"""Pictures from images, through every way to ask for one: what stays is untouched, what is wrong is refused before
anything is computed, and a picture is made again from its recipe and its image."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zimage import GenerationRequest, RequestError, ZImagePipeline, ZImageWarning, read_recipe
from zimage.files.recipe import pixel_digest
from zimage.models.precision import is_finite

from .conftest import CountForwards

BYTES = np.random.default_rng(2).integers(0, 256, (64, 96, 3), dtype=np.uint8)
PICTURE = Image.fromarray(BYTES)
HALF = np.zeros((64, 96), dtype=bool)
HALF[:, 43:] = True
OPTIONS: dict[str, Any] = {"num_inference_steps": 4, "any_size": True, "progress": False}


def draw(pipe: ZImagePipeline, **asked: Any) -> Image.Image:
    image: Image.Image = pipe("a fox", seed=5, **{"image": PICTURE, **OPTIONS, **asked}).images[0]
    return image


def test_unmasked_pixels_are_the_images_own(turbo: ZImagePipeline) -> None:
    made = np.asarray(draw(turbo, mask_image=HALF))
    assert np.array_equal(made[:, :43], BYTES[:, :43])
    assert (made[:, 43:] != BYTES[:, 43:]).mean() > 0.9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_too(turbo_folder: Path, dtype: str) -> None:
    pipe = ZImagePipeline.from_pretrained(turbo_folder, dtype=dtype, device="cpu")
    numbers = torch.from_numpy(BYTES.copy()).movedim(-1, 0).float() / 255 * 0.9
    made = draw(pipe, image=numbers, mask_image=HALF, output_type="pt")
    assert torch.equal(made[:, :, :43], numbers[:, :, :43])
    assert is_finite(made)


def test_outpainting(turbo: ZImagePipeline) -> None:
    made = draw(turbo, padding=(16, 0, 32, 16))
    assert made.size == (144, 80)
    assert np.array_equal(np.asarray(made)[:64, 16:112], BYTES)
    assert (np.asarray(made)[:64, 112:] != np.repeat(BYTES[:, -1:], 32, axis=1)).mean() > 0.9


def test_strength_is_how_far_it_goes(turbo: ZImagePipeline, count_forwards: CountForwards) -> None:
    latents = {}
    for strength, evaluated in ((0.25, 1), (0.5, 2), (1.0, 4)):
        with count_forwards(turbo) as forwards:
            latents[strength] = draw(turbo, strength=strength, output_type="latent")
        assert forwards["evaluation"] == evaluated
    with count_forwards(turbo) as forwards:
        latents["kept"] = draw(turbo, strength=0.25, keep_steps=True, output_type="latent")
    assert forwards["evaluation"] == 4
    assert len({tuple(one.flatten().tolist()) for one in latents.values()}) == 4
    other = draw(turbo, strength=1.0, image=PICTURE.transpose(Image.Transpose.FLIP_LEFT_RIGHT), output_type="latent")
    torch.testing.assert_close(other, latents[1.0])  # from noise alone


@pytest.mark.parametrize("options", [{}, {"mask_image": HALF}], ids=["image", "mask"])
def test_every_way_gives_the_same_bits(base: ZImagePipeline, options: dict[str, Any]) -> None:
    asked = {"image": PICTURE, "strength": 0.5, "num_inference_steps": 4, "any_size": True, **options}
    output = base("a fox", seed=5, num_images_per_prompt=2, progress=False, **asked)
    digests = [pixel_digest(image) for image in output.images]
    assert digests[0] != digests[1]
    requests = [GenerationRequest("a fox", seed=seed, **asked) for seed in (5, 6)]
    many = list(base.generate_many([*requests, output.requests[0]], progress=False))
    assert [pixel_digest(drawn.image) for drawn in many] == [*digests, digests[0]]
    steps = list(base.stream(requests[1]))
    assert [(step.index, step.total) for step in steps] == [(0, 2), (1, 2)]
    assert steps[-1].image is not None
    assert pixel_digest(steps[-1].image) == digests[1]
    again = base(output.requests[1], progress=False)
    assert pixel_digest(again.images[0]) == digests[1]
    assert again.requests[0] == output.requests[1]


@pytest.mark.parametrize(
    "options",
    [{"sampler": "heun"}, {"sampler": "dpmpp_2m"}, {"cache": "balanced"}, {"cache": [0, 1, 3], "sampler": "dpmpp_2m"}],
    ids=str,
)
def test_with_every_sampler_and_predicted_steps(base: ZImagePipeline, options: dict[str, Any]) -> None:
    asked = {"num_inference_steps": 20, "strength": 0.5, "mask_image": HALF, **options}
    made = np.asarray(draw(base, **asked))
    assert np.array_equal(made[:, :43], BYTES[:, :43])
    assert not np.array_equal(made, np.asarray(draw(base, **{**asked, "sampler": None, "cache": None})))
    steps = list(base.stream(GenerationRequest("a", seed=1, image=PICTURE, any_size=True, **asked)))
    assert len(steps) == 10


def test_a_callback_sees_what_stays_already_in_place(turbo: ZImagePipeline) -> None:
    seen: list[tuple[int, torch.Tensor]] = []

    def watch(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, tensors["latents"].clone()))
        return {"latents": tensors["latents"] + 1} if index == 0 else {}

    final = draw(turbo, mask_image=HALF, strength=0.75, callback_on_step_end=watch, output_type="latent")
    plain = draw(turbo, mask_image=HALF, strength=0.75, output_type="latent")
    assert [index for index, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[-1][1][0], final)
    assert torch.equal(final[:, :, :5], plain[:, :, :5])
    assert not torch.equal(final[:, :, 6:], plain[:, :, 6:])


def test_generators(turbo: ZImagePipeline) -> None:
    fresh = turbo("a", image=PICTURE, generator=torch.Generator().manual_seed(5), **OPTIONS)
    assert fresh.requests[0].seed == 5
    assert not fresh.requests[0].tensors
    used = torch.Generator().manual_seed(5)
    seeds = [turbo("a", image=PICTURE, generator=used, **OPTIONS).requests[0].seed for _ in range(3)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    both = turbo(
        ["a", "b"], image=PICTURE, generator=[torch.Generator().manual_seed(seed) for seed in (8, 9)], **OPTIONS
    )
    assert [request.seed for request in both.requests] == [8, 9]
    shared = turbo("a", image=PICTURE, num_images_per_prompt=2, generator=torch.Generator().manual_seed(5), **OPTIONS)
    assert shared.requests[0].seed == 5 != shared.requests[1].seed
    with pytest.raises(RequestError, match="generator has 1 entries for 2 images"):
        turbo(["a", "b"], image=PICTURE, generator=[torch.Generator()], **OPTIONS)


def test_a_list_of_images_has_one_for_each_prompt(turbo: ZImagePipeline) -> None:
    other = PICTURE.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    output = turbo(["a fox", "a fox"], image=[PICTURE, other], seed=[5, 5], mask_image=HALF, **OPTIONS)
    for image, source in zip(output.images, (PICTURE, other), strict=True):
        assert np.array_equal(np.asarray(image)[:, :43], np.asarray(source)[:, :43])


def test_a_size_that_is_cropped_is_said(turbo: ZImagePipeline) -> None:
    image = PICTURE.resize((100, 70))
    with pytest.warns(ZImageWarning, match="image is 100x70, and sides are multiples of 16: the picture is 96x64"):
        made = draw(turbo, image=image, mask_image=np.pad(HALF, ((0, 6), (0, 4))))
    assert np.array_equal(np.asarray(made)[:, :41], np.asarray(image)[3:67, 2:43])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(turbo, image=image, height=64, width=80).size == (80, 64)


def test_a_picture_is_made_again_from_its_file_and_its_image(turbo: ZImagePipeline, tmp_path: Path) -> None:
    draw(turbo, mask_image=HALF, strength=0.75, padding=16).save(tmp_path / "a.png")
    recipe = read_recipe(tmp_path / "a.png")
    assert recipe.request.image is not None
    assert recipe.request.image.digest == pixel_digest(PICTURE)
    assert (recipe.request.strength, recipe.request.padding) == (0.75, (16,) * 4)
    PICTURE.save(tmp_path / "image.png")
    again = turbo.replay(tmp_path / "a.png", image=tmp_path / "image.png", mask_image=HALF)
    assert again.same_bits
    assert not again.differences
    with pytest.raises(RequestError, match="pass image"):
        turbo.replay(tmp_path / "a.png")
    with pytest.raises(RequestError, match="this mask_image is not the one"):
        turbo.replay(tmp_path / "a.png", image=PICTURE, mask_image=~HALF)
    with pytest.raises(RequestError, match="image is known by its digest only"):
        turbo(recipe.request)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mask_image": np.ones((64, 95), bool)}, "must have the size of image, 96x64; it is 95x64"),
        ({"mask_image": np.zeros((64, 96), bool)}, "black everywhere"),
        ({"mask_image": Image.fromarray(HALF), "image": None}, "mask_image is about an image"),
        ({"strength": 1.5}, "strength must be a number from 0 to 1"),
        ({"strength": 0.5, "image": None}, "strength is about an image"),
        ({"image": "there-is-none.png"}, "there is no file"),
        ({"latents": torch.zeros(2, 16, 8, 12), "seed": None}, "image and latents are both given"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(
    turbo: ZImagePipeline, count_forwards: CountForwards, asked: dict[str, Any], said: str
) -> None:
    options = {"seed": 5, "image": PICTURE, **OPTIONS, **asked}
    with count_forwards(turbo) as forwards, pytest.raises(RequestError, match=said):
        turbo(["a fox", "another"], **options)
    assert not forwards
