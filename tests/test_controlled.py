"""Pictures that a ControlNet steers, through every way to ask for one: steered where that is asked and nowhere else,
counted in the plan, and made again from their recipe, the control image and the same ControlNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImageControlNetModel, ZImageControlNetPipeline
from PIL import Image
from torch import Tensor

from zimage import (
    AdapterError,
    GenerationRequest,
    Hires,
    NotEnoughMemory,
    RequestError,
    ZImagePipeline,
    ZImageWarning,
)
from zimage.files.recipe import Recipe, pixel_digest
from zimage.memory.plan import Budget
from zimage.memory.planner import make_plan
from zimage.models.graphs import use_graphs
from zimage.testing import build_controlnet, build_diffusers

from .conftest import CountForwards

RANDOM = np.random.default_rng(3)
CONTROL, OTHER, PICTURE = (Image.fromarray(RANDOM.integers(0, 256, (64, 96, 3), dtype=np.uint8)) for _ in range(3))
HALF = np.zeros((64, 96), dtype=bool)
HALF[:, 43:] = True
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "any_size": True, "progress": False}

Load = Callable[..., ZImagePipeline]


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ControlNet of each version."""
    folder = tmp_path_factory.mktemp("nets")
    return {version: build_controlnet(folder / version, version=version) for version in ("1.0", "2.0", "2.1")}  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def steered(turbo_folder: Path, nets: dict[str, Path]) -> ZImagePipeline:
    """Nobody changes it."""
    return load(turbo_folder, controlnet=nets["2.1"])


def load(folder: Path, **options: Any) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, **{"dtype": "float32", "device": "cpu", **options})


def test_pictures_of_a_generator_have_the_size_of_their_control_image(steered: ZImagePipeline) -> None:
    small = CONTROL.resize((64, 64))
    for generator in (torch.Generator().manual_seed(3), [torch.Generator().manual_seed(seed) for seed in (3, 4)]):
        images = steered(["a", "b"], control_image=[small, CONTROL], generator=generator, **OPTIONS).images
        assert [image.size for image in images] == [(64, 64), (96, 64)]
        for image, control in zip(images, (small, CONTROL), strict=True):
            assert steered.replay(image.recipe, control_image=control).same_bits


def draw(pipe: ZImagePipeline, **asked: Any) -> Tensor:
    """Latents, unless another type is asked for."""
    given = {"height": 64, "width": 96, "output_type": "latent", **OPTIONS, **asked}
    images: Tensor = pipe("a fox", seed=5, **given).images  # type: ignore[union-attr]
    return images


def test_without_a_control_image_nothing_changes(turbo_folder: Path, nets: dict[str, Path]) -> None:
    pipe = load(turbo_folder)
    plain = draw(pipe)
    assert pipe.controlnet is None
    loaded = pipe.load_controlnet(nets["2.1"])
    assert pipe.controlnet is loaded
    assert str(loaded).endswith("2 control layers, 33 channels, 0.00 GiB")
    assert torch.equal(draw(pipe), plain)
    made = draw(pipe, control_image=CONTROL)
    assert (made - plain).abs().max() > 0.1
    assert (draw(pipe, control_image=OTHER) - made).abs().max() > 0.1
    assert torch.equal(draw(pipe), plain)
    pipe.unload_controlnet()
    assert torch.equal(draw(pipe), plain)
    pipe.unload_controlnet()
    with pytest.raises(
        RequestError, match=r"needs a ControlNet and none is loaded; load one with pipe.load_controlnet"
    ):
        draw(pipe, control_image=CONTROL)


def test_the_scale_goes_from_nothing_on(steered: ZImagePipeline) -> None:
    plain = draw(steered)
    drawn = {scale: draw(steered, control_image=CONTROL, controlnet_conditioning_scale=scale) for scale in (0, 0.01, 1)}
    assert torch.equal(drawn[0], plain)
    assert 0 < (drawn[0.01] - plain).norm() < 0.1 * (drawn[1] - plain).norm()
    usual = draw(steered, control_image=CONTROL)
    assert torch.equal(usual, draw(steered, control_image=CONTROL, controlnet_conditioning_scale=0.75))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"controlnet_conditioning_scale": 0.5}, "is about a control_image and none is given"),
        (
            {"control_image": CONTROL, "controlnet_conditioning_scale": 2.1},
            "must be a number from 0 to 2, got float 2.1",
        ),
        ({"control_image": CONTROL, "controlnet_conditioning_scale": -1}, "must be a number from 0 to 2"),
        ({"control_image": CONTROL, "controlnet_conditioning_scale": [0.5]}, "must be a number from 0 to 2"),
        ({"control_image": "nothing.png"}, "nothing.png"),
        ({"control_image": np.full((64, 96, 3), 2.0)}, r"control_image must have numbers in \[0, 1\]"),
    ],
)
def test_what_cannot_work_is_refused(steered: ZImagePipeline, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        draw(steered, **asked)


def test_a_second_one_is_refused_and_the_first_stays(turbo_folder: Path, nets: dict[str, Path]) -> None:
    pipe = load(turbo_folder, controlnet=nets["1.0"])
    made, sizes = draw(pipe, control_image=CONTROL), pipe.plan and pipe.plan.sizes
    with pytest.raises(AdapterError, match=r"a ControlNet is loaded already .*1.0\); unload_controlnet\(\) first"):
        pipe.load_controlnet(nets["2.1"])
    assert torch.equal(draw(pipe, control_image=CONTROL), made)
    assert pipe.plan is not None
    assert pipe.plan.sizes == sizes
    assert repr(pipe.controlnet).startswith("ControlNet(source=")
    assert "\n" not in repr(pipe.controlnet)
    pipe.close()
    assert pipe.controlnet is None


def test_recordings_are_let_go_of_for_it(turbo_folder: Path, nets: dict[str, Path]) -> None:
    """No plan counts their memory."""
    pipe = load(turbo_folder)
    use_graphs(pipe.transformer, lambda compute: (lambda: None, compute()), "cpu")
    pipe("a fox", seed=1, height=64, width=64, **OPTIONS)
    kept = vars(pipe.transformer)["refine"].__self__._kept
    assert kept
    pipe.load_controlnet(nets["1.0"])
    assert not kept


def test_the_size_is_the_control_images(steered: ZImagePipeline) -> None:
    asked = {"control_image": CONTROL, "height": None, "width": None}
    assert draw(steered, **asked).shape == (1, 16, 8, 12)
    assert draw(steered, **{**asked, "height": 32}).shape == (1, 16, 4, 6)
    with pytest.warns(ZImageWarning, match="the control_image is 96x60, and sides are multiples of 16"):
        assert draw(steered, **{**asked, "control_image": CONTROL.crop((0, 0, 96, 60))}).shape == (1, 16, 6, 12)
    wide = CONTROL.resize((192, 128))
    assert draw(steered, **{**asked, "control_image": wide, "image": PICTURE}).shape == (1, 16, 8, 12)


@pytest.mark.parametrize("version", ["1.0", "2.0", "2.1"])
def test_pixels_under_black_stay(turbo_folder: Path, nets: dict[str, Path], version: str) -> None:
    """Told of the mask, as from 2.0 on, or not, where the image is put back after each step as without one."""
    pipe = load(turbo_folder, controlnet=nets[version])
    asked = {"image": PICTURE, "mask_image": HALF, "output_type": "np"}
    made, plain = draw(pipe, control_image=CONTROL, **asked), draw(pipe, **asked)
    kept = np.asarray(PICTURE)[:, :43].astype(np.float32) / 255
    assert np.array_equal(made[0, :, :43], kept)
    assert (np.abs(made[0, :, 43:] - plain[0, :, 43:]) > 0.01).mean() > 0.5
    asked["output_type"] = "latent"
    latents, without = draw(pipe, control_image=CONTROL, **asked), draw(pipe, **asked)
    assert torch.equal(latents[..., :5], without[..., :5]) == (version == "1.0")


def test_from_an_image_and_with_padding(steered: ZImagePipeline) -> None:
    pipe = steered
    asked = {"image": PICTURE, "strength": 0.5, "keep_steps": True, "height": None, "width": None}
    near, far = (draw(pipe, control_image=CONTROL, **{**asked, "strength": strength}) for strength in (0.1, 0.9))
    without = draw(pipe, **{**asked, "strength": 0.1})
    assert 0 < (near - without).norm() < (far - without).norm()
    masked = [draw(pipe, control_image=control, mask_image=HALF, **asked) for control in (CONTROL, None)]
    assert not torch.equal(masked[0][..., :5], masked[1][..., :5])  # told of the mask, nothing is put back meanwhile
    made = draw(pipe, control_image=CONTROL, padding=(16, 0, 16, 32), output_type="np", **asked)
    assert made.shape == (1, 96, 128, 3)
    assert np.array_equal(made[0, :64, 16:112], np.asarray(PICTURE).astype(np.float32) / 255)


def test_every_way_gives_the_same_bits(base_folder: Path, nets: dict[str, Path]) -> None:
    pipe = load(base_folder, controlnet=nets["2.1"])
    asked = {"control_image": CONTROL, "num_inference_steps": 3, "any_size": True, "negative_prompt": "blurry " * 20}
    output = pipe("a fox", seed=5, num_images_per_prompt=2, progress=False, **asked)
    digests = [pixel_digest(image) for image in output.images]  # type: ignore[union-attr]
    requests = [GenerationRequest("a fox", seed=seed, **asked) for seed in (5, 6)]
    assert len(set(digests)) == 2
    assert [pixel_digest(one.image) for one in pipe.generate_many(requests, progress=False)] == digests
    steps = list(pipe.stream(requests[1]))
    assert steps[-1].image is not None
    assert pixel_digest(steps[-1].image) == digests[1]
    asked["control_image"] = [CONTROL, OTHER]
    two = pipe(["a fox", "a fox"], seed=[5, 5], progress=False, **asked)
    assert [pixel_digest(image) == digests[0] for image in two.images] == [True, False]  # type: ignore[union-attr]


def test_a_picture_is_made_again_from_its_recipe(
    turbo_folder: Path, nets: dict[str, Path], steered: ZImagePipeline
) -> None:
    made = draw(steered, control_image=CONTROL, controlnet_conditioning_scale=0.5, output_type="pil")[0]
    recipe = Recipe.from_json(made.recipe.to_json())  # type: ignore[attr-defined]
    assert recipe.request.control_image is not None
    assert recipe.request.control_image.digest == pixel_digest(CONTROL)
    assert recipe.request.controlnet_conditioning_scale == 0.5
    assert recipe.controlnet["source"].endswith("2.1")
    assert not recipe.replayable
    assert steered.replay(recipe, control_image=CONTROL).same_bits
    with pytest.raises(RequestError, match=r"was made from control_image .* pass control_image"):
        steered.replay(recipe)
    with pytest.raises(RequestError, match="this control_image is not the one"):
        steered.replay(recipe, control_image=OTHER)
    pipe = load(turbo_folder)
    with pytest.raises(
        AdapterError, match=r"made with the ControlNet .* none is loaded; load that with load_controlnet"
    ) as caught:
        pipe.replay(recipe, control_image=CONTROL)
    assert f"the ControlNet {recipe.controlnet['source']!r} (" in str(caught.value)
    pipe.load_controlnet(nets["1.0"])
    with pytest.raises(AdapterError, match=r"made with the ControlNet .* another is loaded here"):
        pipe.replay(recipe, control_image=CONTROL)
    assert draw(steered, output_type="pil")[0].recipe.controlnet == {}  # type: ignore[attr-defined]


@pytest.mark.parametrize("other", [None, "1.0"])
@pytest.mark.parametrize("more", [{}, {"hires": Hires(2, 0.5)}])
def test_a_picture_keeps_the_controlnet_that_it_began_with(
    turbo_folder: Path, nets: dict[str, Path], steered: ZImagePipeline, other: str | None, more: dict[str, Any]
) -> None:
    """Whether it is let go of or another comes, in each pass and in the recipe."""
    request = GenerationRequest("a fox", seed=5, control_image=CONTROL, num_inference_steps=2, any_size=True, **more)
    expected = [*steered.stream(request)][-1].image
    pipe = load(turbo_folder, controlnet=nets["2.1"])
    stream = pipe.stream(request)
    next(stream)
    pipe.unload_controlnet()
    if other is not None:
        pipe.load_controlnet(nets[other])
    made = [*stream][-1].image
    assert made is not None
    assert expected is not None
    assert made.recipe == expected.recipe
    assert made.recipe is not None
    assert made.recipe.controlnet["source"].endswith("2.1")


def test_many_pictures_each_have_the_controlnet_that_they_began_with(
    turbo_folder: Path, nets: dict[str, Path], steered: ZImagePipeline
) -> None:
    """What gives the requests is asked for the next one before the last step."""
    asked = GenerationRequest("a fox", seed=5, control_image=CONTROL, num_inference_steps=2, any_size=True)
    pipe = load(turbo_folder, controlnet=nets["2.1"])

    def requests() -> Iterator[GenerationRequest]:
        yield asked
        pipe.unload_controlnet()
        pipe.load_controlnet(nets["1.0"])
        yield asked

    made = [drawn.image.recipe for drawn in pipe.generate_many(requests(), progress=False)]
    now = [one(asked, progress=False).images[0].recipe for one in (steered, pipe)]  # type: ignore[union-attr]
    assert made == now
    assert made[0] is not None
    assert made[0].controlnet != now[1].controlnet


def test_predicted_steps_and_samplers(base_folder: Path, nets: dict[str, Path], count_forwards: CountForwards) -> None:
    pipe = load(base_folder, controlnet=nets["2.1"])
    asked = {"control_image": CONTROL, "num_inference_steps": 8, "guidance_scale": 0}
    with count_forwards(pipe) as forwards:
        predicted = draw(pipe, cache=[0, 1, 2, 5, 7], **asked)
    assert forwards["evaluation"] == 5
    whole = draw(pipe, **asked)
    assert 0 < (predicted - whole).norm() < (draw(pipe, **{**asked, "control_image": None}) - whole).norm()
    assert (
        len({tuple(draw(pipe, sampler=one, **asked).flatten().tolist()) for one in ("euler", "heun", "dpmpp_2m")}) == 3
    )


@pytest.mark.parametrize("version", ["1.0", "2.1"])
def test_layers_that_pass_through_give_the_same_bits(turbo_folder: Path, nets: dict[str, Path], version: str) -> None:
    pipe = load(turbo_folder, controlnet=nets[version])
    expected = draw(pipe, control_image=CONTROL)
    pipe.enable_sequential_cpu_offload()
    assert pipe.transformer.layers[0].attention.to_q.weight.is_meta
    assert torch.equal(draw(pipe, control_image=CONTROL), expected)


def test_the_plan_counts_it(turbo_folder: Path, nets: dict[str, Path]) -> None:
    pipe = load(turbo_folder)
    assert pipe.plan is not None
    before = pipe.plan
    size = pipe.load_controlnet(nets["2.1"]).bytes
    assert (pipe.plan.sizes.adapters, pipe.plan.sizes.control_blocks) == (size, 4)
    stages = {stage.name: stage.device for stage in pipe.plan.stages}
    assert stages["decoding"] == {stage.name: stage.device for stage in before.stages}["decoding"] + size
    assert stages["denoising"] > {stage.name: stage.device for stage in before.stages}["denoising"] + size
    pipe.unload_controlnet()
    assert (pipe.plan.stages, pipe.plan.sizes) == (before.stages, before.sizes)


def within(folder: Path, room: int) -> ZImagePipeline:
    """Planned for pictures of 256 x 256 and so many bytes besides, as if there were no more."""
    plan = load(folder).plan
    assert plan is not None
    plan = make_plan(plan.sizes, replace(plan.work, height=256, width=256), plan.budget)
    return load(folder, memory=replace(plan, budget=Budget(device=plan.device_peak + room, host=None, name="little")))


def test_what_does_not_fit_beside_it_passes_through(turbo_folder: Path, nets: dict[str, Path]) -> None:
    pipe = within(turbo_folder, 150_000)
    expected = draw(pipe)
    pipe.load_controlnet(nets["2.1"])
    assert pipe.plan is not None
    assert pipe.plan.placement.text_encoder == "streamed"
    assert pipe.plan.device_peak <= pipe.plan.budget.device
    assert f"the ControlNet {nets['2.1']} needed room; since then: text encoder st" in pipe.plan.stepped_down[-1]
    assert torch.equal(draw(pipe), expected)


def test_what_does_not_fit_at_all_leaves_no_trace(turbo_folder: Path, nets: dict[str, Path]) -> None:
    pipe = within(turbo_folder, -14_000_000)
    assert pipe.plan is not None
    before, expected = pipe.plan, draw(pipe)
    with pytest.raises(NotEnoughMemory, match=r"the ControlNet .*2.1 does not fit: with .* decoding needs"):
        pipe.load_controlnet(nets["2.1"])
    assert pipe.controlnet is None
    assert (pipe.plan.placement, pipe.plan.stages, pipe.plan.sizes) == (before.placement, before.stages, before.sizes)
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("kind", ["int8", "nf4", "bfloat16"])
def test_weights_in_fewer_bits(turbo_folder: Path, nets: dict[str, Path], kind: str, steered: ZImagePipeline) -> None:
    """The ControlNet's own stay in full."""
    pipe = load(turbo_folder, weight_dtype=kind, controlnet=nets["2.1"])
    assert {type(layer) for layer in pipe.controlnet.net.modules() if hasattr(layer, "in_features")} == {
        torch.nn.Linear
    }  # type: ignore[union-attr]
    made, plain, exact = draw(pipe, control_image=CONTROL), draw(pipe), draw(steered, control_image=CONTROL)
    assert (made - exact).norm() < 0.6 * (plain - exact).norm()


def test_it_follows_the_pipeline(turbo_folder: Path, nets: dict[str, Path], steered: ZImagePipeline) -> None:
    pipe = load(turbo_folder, controlnet=nets["2.1"])
    pipe.to(torch.bfloat16)
    assert pipe.controlnet is not None
    assert pipe.controlnet.net.dtype == torch.bfloat16
    loaded = load(turbo_folder, dtype="bfloat16", controlnet=nets["2.1"])
    made = draw(pipe, control_image=CONTROL)
    assert torch.equal(made, draw(loaded, control_image=CONTROL))
    exact = draw(steered, control_image=CONTROL)
    assert 0 < (made - exact).norm() < 0.1 * exact.norm()


def test_a_lora_and_a_controlnet_act_together(turbo_folder: Path, nets: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    halves = {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4)}
    name = "diffusion_model.layers.0.attention.to_v"
    save_file(
        {f"{name}.{half}": torch.full(shape, 0.1) for half, shape in halves.items()}, tmp_path / "ink.safetensors"
    )
    pipe = load(turbo_folder, controlnet=nets["2.1"])
    pipe.load_adapter(tmp_path / "ink.safetensors", strength=0)
    drawn = [draw(pipe, control_image=control, adapters={"ink": ink}) for control in (None, CONTROL) for ink in (0, 1)]
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == 4
    assert pipe.plan is not None
    assert pipe.controlnet is not None
    assert pipe.plan.sizes.adapters > pipe.controlnet.bytes


def test_from_diffusers_pipeline_with_one(nets: dict[str, Path], steered: ZImagePipeline) -> None:
    theirs = ZImageControlNetPipeline(
        **build_diffusers().components, controlnet=ZImageControlNetModel.from_pretrained(nets["2.1"])
    )
    pipe = ZImagePipeline.from_diffusers(theirs)
    assert torch.equal(draw(pipe, control_image=CONTROL), draw(steered, control_image=CONTROL))
    assert theirs.controlnet.t_embedder is theirs.transformer.t_embedder


def test_steered_forwards_are_not_recorded(turbo_folder: Path, nets: dict[str, Path]) -> None:
    """In graphs: what a hint adds would be fixed in the recording."""
    pipe, recorded = load(turbo_folder, controlnet=nets["2.1"]), []

    def record(compute: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        result = compute()
        recorded.append(result)
        return (lambda: result.copy_(compute())), result

    expected = [draw(pipe), draw(pipe, control_image=CONTROL), draw(pipe, control_image=OTHER)]
    use_graphs(pipe.transformer, record, "cpu")
    for one, asked in zip(expected, (None, CONTROL, OTHER), strict=True):
        assert torch.equal(draw(pipe, control_image=asked), one)
    assert len(recorded) == 2  # refine and denoise without one; of steered ones only what the transformer refines


def test_nan_in_half_precision_is_computed_again(turbo_folder: Path, nets: dict[str, Path], tmp_path: Path) -> None:
    """A hint beyond float16's end, of a ControlNet that float32 has numbers for."""
    net = ZImageControlNetModel.from_pretrained(nets["1.0"])
    with torch.no_grad():
        net.control_layers[0].after_proj.bias += 6e4
    pipe = load(turbo_folder, dtype="float16", controlnet=net)
    assert draw(pipe, control_image=CONTROL, controlnet_conditioning_scale=2).isfinite().all()
