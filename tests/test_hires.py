"""A second pass at a larger size: what it asks for, the very pictures of image-to-image, and its recipe."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from zimage import GenerationRequest, Hires, RequestError, ZImagePipeline, starting
from zimage.files.images import read_image
from zimage.files.recipe import Recipe
from zimage.hires import STRENGTHS, demands, passes, resolve_hires
from zimage.models.autoencoder import to_image
from zimage.request import ResolvedRequest
from zimage.rules import Limits
from zimage.sampling.noise import seeded_noise
from zimage.starting import enlarged
from zimage.testing import build_controlnet
from zimage.variants import BASE, TURBO

SMALL: dict[str, Any] = {"height": 64, "width": 96, "any_size": True, "seed": 3, "num_inference_steps": 4}


def asked(hires: Any, **options: Any) -> ResolvedRequest:
    return GenerationRequest("a fox", **{**SMALL, "hires": hires, **options}).resolve(TURBO)


def latents(pipe: ZImagePipeline, **options: Any) -> Tensor:
    made = pipe("a fox", progress=False, output_type="latent", **{**SMALL, **options}).images  # type: ignore[union-attr]
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize(
    ("hires", "expected"),
    [
        (2, Hires(2.0, 0.4, "pixels", (128, 192))),
        (1.5, Hires(1.5, 0.4, "pixels", (96, 144))),
        (np.float32(1.5), Hires(1.5, 0.4, "pixels", (96, 144))),
        (np.int64(2), Hires(2.0, 0.4, "pixels", (128, 192))),
        (1.6, Hires(1.6, 0.4, "pixels", (96, 160))),  # 102.4 and 153.6, to multiples of 16
        (Hires(upscale="latents"), Hires(2.0, 0.6, "latents", (128, 192))),
        ({"scale": 3, "strength": 0.5}, Hires(3.0, 0.5, "pixels", (192, 288))),
        (Hires(2, 1.0, size=(1, 1)), Hires(2.0, 1.0, "pixels", (128, 192))),
    ],
)
def test_what_is_left_open_is_filled(hires: Any, expected: Hires) -> None:
    request = asked(hires)
    assert request.hires == expected
    assert request.resolve(TURBO) == request
    assert set(STRENGTHS) == {"pixels", "latents"}


@pytest.mark.parametrize(
    ("hires", "options", "said"),
    [
        (True, {}, "how many times as large"),
        ("2", {}, "how many times as large"),
        ({"factor": 2}, {}, "how many times as large"),
        (0.5, {}, "hires: its scale must be a number from 1 to 4, got float 0.5"),
        (5, {}, "hires: its scale must be a number from 1 to 4"),
        (float("nan"), {}, "hires: its scale must be a number"),
        (1, {}, "1 times 96x64 is the same size; raise the scale"),
        (1.05, {}, "1.05 times 96x64 is the same size"),
        (Hires(2, 1.5), {}, "hires: its strength must be a number from 0 to 1"),
        (Hires(2, 0.0), {}, "strength 0 leaves none of 4 steps for the second pass; raise it to 0.25"),
        (Hires(upscale="lanczos"), {}, "its upscale must be pixels or latents, got str 'lanczos'"),
        (4, {"height": 8192}, "and a side has at most"),
        (4, {"any_size": False, "height": 1024, "width": 1024}, r"4096x4096 is .* Lower the scale of hires"),
    ],
)  # fmt: skip
def test_what_cannot_work(hires: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        asked(hires, **options)


@pytest.mark.parametrize("option", [{"mask_image": object()}, {"padding": 16}])
def test_a_part_that_stays_cannot_be_made_anew(option: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="a mask or padding keeps a part of it to the bit"):
        resolve_hires(GenerationRequest("a fox", hires=2, **option), (64, 64), 4, Limits())


def test_steps_of_both_passes_are_counted() -> None:
    options = {**SMALL, "num_inference_steps": 20, "cache": "balanced", "diversity": 1}
    request = GenerationRequest("a fox", hires=Hires(2, 0.5), **options).resolve(BASE)
    first, again = passes(request)
    assert (request.steps, first.steps, again.steps) == (30, 20, 10)
    assert first == replace(request, hires=None)
    assert (again.height, again.width, again.strength) == (128, 192, 0.5)
    assert (again.cache, again.diversity, again.keep_steps) == ((), 0.0, False)
    assert passes(first) == (first,)


def test_a_plan_is_for_the_larger_size() -> None:
    assert demands(asked(None))[:2] == (64, 96)
    assert demands(asked(2)) == (128, 192, asked(2).max_sequence_length, True, 0)
    assert demands(asked(Hires(upscale="latents"))).from_image is False


def test_a_plan_knows_how_many_tokens_both_branches_of_any_pass_have_together() -> None:
    def tokens(side: int, **options: Any) -> int:
        request = GenerationRequest("", height=side, width=side, max_sequence_length=100, **options)
        return demands(request.resolve(BASE)).together

    assert tokens(512, guidance_scale=0) == 0
    assert tokens(512, guidance_scale=4) == 2 * (1024 + 128)
    assert tokens(704, guidance_scale=4) == 4096  # with shorter prompts; with these it has one after the other
    assert tokens(720, guidance_scale=4) == tokens(1024, guidance_scale=4) == 0
    assert tokens(640, guidance_scale=4, hires=1.25) == 2 * (1600 + 128)
    edges = read_image(Image.new("RGB", (512, 512)), "control_image")
    assert tokens(512, guidance_scale=4, control_image=edges) == 0


def test_the_second_pass_is_image_to_image(turbo: ZImagePipeline) -> None:
    """On the first's picture, enlarged: the bits of asking for that."""
    whole = latents(turbo, hires=Hires(2, 0.5))
    first = latents(turbo)
    with torch.no_grad():
        pixels = enlarged(turbo.autoencoder.decode(first), 128, 192).clamp(0, 1)
    again = latents(turbo, image=pixels[0], strength=0.5, height=128, width=192)
    assert whole.shape == (1, 16, 16, 24)
    assert torch.equal(whole, again)


def test_latents_are_enlarged_as_they_are(turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decoded or encoded for it; at strength 1 the second pass starts from noise."""
    monkeypatch.setattr(type(turbo.autoencoder), "encode", lambda *given: pytest.fail("encoded"))
    monkeypatch.setattr(type(turbo.autoencoder), "decode", lambda *given: pytest.fail("decoded"))
    low, full = (latents(turbo, hires=Hires(2, strength, "latents")) for strength in (0.25, 1.0))
    larger = enlarged(latents(turbo), 16, 24)
    distances = [((one - larger).norm() / larger.norm()).item() for one in (low, full)]
    assert distances[0] < 0.5 * distances[1]


def test_pictures_streams_and_many_are_the_same(turbo: ZImagePipeline) -> None:
    request = GenerationRequest("a fox", hires=2, **SMALL)
    output = turbo(request, progress=False)
    made = output.images[0]  # type: ignore[union-attr]
    assert made.size == (192, 128)
    steps = list(turbo.stream(request))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4, 5]
    assert {step.total for step in steps} == {6}
    assert [tuple(step.latents.shape[2:]) for step in steps] == [(8, 12)] * 4 + [(16, 24)] * 2
    assert [step.image is None for step in steps] == [True] * 5 + [False]
    assert steps[-1].preview().size == (24, 16)
    (drawn,) = turbo.generate_many([request], progress=False)
    for image in (steps[-1].image, drawn.image):
        assert image is not None
        assert image.tobytes() == made.tobytes()


def test_each_picture_is_that_of_its_seed(turbo: ZImagePipeline) -> None:
    options = {**SMALL, "seed": None, "hires": 2}
    both = turbo("a fox", progress=False, **options | {"seed": 7, "num_images_per_prompt": 2}).images  # type: ignore[union-attr]
    alone = turbo("a fox", progress=False, **options | {"seed": 8}).images  # type: ignore[union-attr]
    assert both[1].tobytes() == alone[0].tobytes()
    assert both[0].tobytes() != alone[0].tobytes()


@pytest.mark.parametrize("upscale", ["pixels", "latents"])
def test_given_latents_and_a_seed_for_what_else_is_drawn(turbo: ZImagePipeline, upscale: str) -> None:
    options: dict[str, Any] = {"latents": seeded_noise(3, (1, 16, 8, 12)), "hires": Hires(2, 0.5, upscale)}
    assert torch.equal(latents(turbo, **options), latents(turbo, hires=options["hires"]))
    other = latents(turbo, **{**options, "seed": 4})
    assert not torch.equal(other, latents(turbo, **options))
    assert torch.equal(latents(turbo, **{**options, "seed": None}), latents(turbo, **{**options, "seed": 0}))
    two = {**options, "latents": options["latents"].expand(2, -1, -1, -1), "num_images_per_prompt": 2}
    assert torch.equal(latents(turbo, **two)[1:], other)


def test_a_picture_of_given_latents_is_made_again_from_its_recipe_and_them(turbo: ZImagePipeline) -> None:
    noise = {"latents": seeded_noise(9, (1, 16, 8, 12))}
    made = turbo("a fox", progress=False, hires=Hires(2, 0.5), **{**SMALL, **noise}).images[0]  # type: ignore[union-attr]
    recipe = Recipe.from_json(made.recipe.to_json())
    assert (recipe.request.seed, recipe.given) == (3, ("latents",))
    again = turbo(replace(recipe.request, tensors=noise), progress=False).images[0]  # type: ignore[union-attr]
    assert again.recipe == made.recipe


def test_from_an_image(turbo: ZImagePipeline) -> None:
    """The first pass starts from it, the second from the first."""
    source = Image.fromarray((np.arange(64 * 96 * 3) % 251).astype(np.uint8).reshape(64, 96, 3))
    options: dict[str, Any] = {"image": source, "strength": 0.5, "any_size": True, "seed": 3, "num_inference_steps": 4}
    whole = turbo("a fox", progress=False, output_type="latent", hires=Hires(2, 0.25), **options).images  # type: ignore[union-attr]
    first = turbo("a fox", progress=False, output_type="latent", **options).images  # type: ignore[union-attr]
    with torch.no_grad():
        pixels = enlarged(turbo.autoencoder.decode(first), 128, 192).clamp(0, 1)
    assert torch.equal(whole, latents(turbo, image=pixels[0], strength=0.25, height=128, width=192))


def test_a_control_image_steers_both_passes(turbo_folder: Path, tmp_path: Path) -> None:
    """In the second it is scaled to the larger size."""
    net = build_controlnet(tmp_path / "net")
    pipe = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu", controlnet=net)
    edges = torch.rand((3, 64, 96), generator=torch.Generator().manual_seed(0))
    steered: dict[str, Any] = {"control_image": edges, "controlnet_conditioning_scale": 1.0}
    whole = latents(pipe, hires=Hires(2, 0.5), **steered)
    first = latents(pipe, **steered)
    with torch.no_grad():
        pixels = enlarged(pipe.autoencoder.decode(first), 128, 192).clamp(0, 1)
    options: dict[str, Any] = {"image": pixels[0], "strength": 0.5, "height": 128, "width": 192}
    assert torch.equal(whole, latents(pipe, **options, **steered))
    assert not torch.equal(whole, latents(pipe, **options))


def test_a_picture_is_made_again_from_its_file(turbo: ZImagePipeline, tmp_path: Path) -> None:
    image = turbo("a fox", progress=False, hires=Hires(1.5, 0.5, "latents"), **SMALL).images[0]  # type: ignore[union-attr]
    image.save(tmp_path / "fox.png")
    again = turbo.replay(tmp_path / "fox.png")
    assert again.same_bits
    assert again.request.hires == Hires(1.5, 0.5, "latents", (96, 144))
    with Image.open(tmp_path / "fox.png") as opened:
        said = opened.info["parameters"]
    assert "Size: 96x64" in said
    assert "Hires upscale: 1.5, Hires upscaler: Latents, Hires denoising strength: 0.5" in said


def test_a_callback_sees_both_passes_and_what_it_changes_stays(turbo: ZImagePipeline) -> None:
    seen: list[tuple[int, tuple[int, ...], bool]] = []

    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        features = tensors["prompt_embeds"][0]
        seen.append((step, tuple(tensors["latents"].shape[2:]), bool((features == 0).all())))
        return {"prompt_embeds": [torch.zeros_like(features)]} if step == 1 else {}

    names = ["latents", "prompt_embeds"]
    changed = latents(
        turbo, hires=Hires(2, 0.5), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names
    )
    assert [one[0] for one in seen] == [0, 1, 2, 3, 4, 5]
    assert [one[1] for one in seen] == [(8, 12)] * 4 + [(16, 24)] * 2
    assert [one[2] for one in seen] == [False, False, True, True, True, True]
    assert not torch.equal(changed, latents(turbo, hires=Hires(2, 0.5)))


@pytest.mark.parametrize("at", [3, 4])
def test_features_that_are_changed_late_act_in_the_steps_that_are_left(turbo: ZImagePipeline, at: int) -> None:
    """At the first pass's last step, and at the second's first, after which one is left."""
    taken: list[int] = []

    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        taken.append(step)
        return {"prompt_embeds": [torch.zeros_like(tensors["prompt_embeds"][0])]} if step == at else {}

    options: dict[str, Any] = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    changed = latents(turbo, hires=Hires(2, 0.5), **options)
    assert taken == [0, 1, 2, 3, 4, 5]
    assert not torch.equal(changed, latents(turbo, hires=Hires(2, 0.5)))


def test_it_can_be_cancelled_between_the_passes(turbo: ZImagePipeline) -> None:
    from zimage import Cancelled

    event, taken = threading.Event(), []

    def callback(pipe: Any, step: int, *given: Any) -> None:
        taken.append(step)
        if step == 3:
            event.set()

    with pytest.raises(Cancelled):
        latents(turbo, hires=2, callback_on_step_end=callback, cancel=event)
    assert taken == [0, 1, 2, 3]


def test_a_picture_that_does_not_fit_is_refused_by_its_final_size(turbo_folder: Path) -> None:
    from zimage import NotEnoughMemory

    pipe = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu", memory="1GiB")
    options: dict[str, Any] = {"any_size": True, "height": 2048, "width": 2048, "num_inference_steps": 4}
    with pytest.raises(NotEnoughMemory, match="8192x8192"):
        pipe("a fox", hires=4, progress=False, **options)


@pytest.mark.parametrize("upscale", ["pixels", "latents"])
def test_memory_that_runs_out_between_the_passes_is_done_without(
    turbo_folder: Path, monkeypatch: pytest.MonkeyPatch, upscale: str
) -> None:
    pipe = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu")
    expected = latents(pipe, hires=Hires(2, 0.5, upscale))
    full, begin = ["now", "and with what is free"], starting.from_larger

    def fails_twice(*given: Any) -> Any:
        if full:
            full.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return begin(*given)

    monkeypatch.setattr(starting, "from_larger", fails_twice)
    output = pipe("a fox", progress=False, output_type="latent", hires=Hires(2, 0.5, upscale), **SMALL)
    assert not full
    assert len(output.stepped_down) == 1  # type: ignore[union-attr]
    assert "192x128" in output.stepped_down[0]  # type: ignore[union-attr]
    torch.testing.assert_close(output.images, expected, rtol=0, atol=1e-3)  # type: ignore[union-attr]


@pytest.mark.parametrize(("upscale", "stage"), [("pixels", "decoding"), ("latents", "denoising")])
def test_memory_that_runs_out_while_the_first_pass_is_enlarged_is_done_without(
    turbo_folder: Path, monkeypatch: pytest.MonkeyPatch, upscale: str, stage: str
) -> None:
    pipe = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu")
    expected = latents(pipe, hires=Hires(2, 0.5, upscale))
    full = ["now", "and with what is free"]

    def fails_twice(*given: Any) -> Tensor:
        if full:
            full.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return enlarged(*given)

    monkeypatch.setattr("zimage.pipeline.enlarged", fails_twice)
    output = pipe("a fox", progress=False, output_type="latent", hires=Hires(2, 0.5, upscale), **SMALL)
    assert not full
    (said,) = output.stepped_down  # type: ignore[union-attr]
    assert f"{stage} ran out of memory at 96x64" in said
    torch.testing.assert_close(output.images, expected, rtol=0, atol=1e-3)  # type: ignore[union-attr]


def test_only_pictures_of_one_final_size_are_stacked(turbo: ZImagePipeline) -> None:
    small, large = (GenerationRequest("a fox", **{**SMALL, "hires": hires}) for hires in (None, 2))
    with pytest.raises(RequestError, match="needs images of one size"):
        turbo([small, large], output_type="pt", progress=False)
    whole = replace(small, height=128, width=192)
    assert turbo([large, whole], output_type="latent", progress=False).images.shape == (2, 16, 16, 24)  # type: ignore[union-attr]


def test_pictures_of_one_generator_have_noise_of_their_own(turbo: ZImagePipeline) -> None:
    options: dict[str, Any] = {**SMALL, "seed": None, "num_images_per_prompt": 2}
    made = turbo("a fox", progress=False, hires=2, generator=torch.Generator().manual_seed(3), **options)
    first, second = made.requests  # type: ignore[union-attr]
    assert first.seed == 3
    assert second.seed not in (0, 3)


def test_enlarging_keeps_what_is_flat() -> None:
    flat = torch.full((1, 3, 4, 6), 0.25, dtype=torch.bfloat16)
    larger = enlarged(flat, 10, 14)
    assert (larger.shape, larger.dtype) == ((1, 3, 10, 14), torch.float32)
    torch.testing.assert_close(larger, torch.full_like(larger, 0.25))


def test_enlarging_is_bicubic() -> None:
    """With the kernel of Keys at a = -0.75, half a pixel from the edge, which overshoots on both sides."""
    edge = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]).expand(1, 1, 6, 6)
    row = enlarged(edge, 12, 12)[0, 0, 6]
    torch.testing.assert_close(
        row[4:8], torch.tensor([-0.10546875, 0.2265625, 0.7734375, 1.10546875]), atol=0.02, rtol=0
    )
    assert row.min() < -0.03
    assert row.max() > 1.03


def test_its_image_is_what_was_decoded(turbo: ZImagePipeline) -> None:
    made = turbo("a fox", progress=False, hires=2, **SMALL)
    final = latents(turbo, hires=2)
    with torch.no_grad():
        assert to_image(turbo.autoencoder.decode(final)).tobytes() == made.images[0].tobytes()  # type: ignore[union-attr]
