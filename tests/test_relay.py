"""Pictures that the base model begins and Turbo finishes: their bits, steps and recipes, and what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zimage import (
    AdapterError,
    Cancelled,
    GenerationRequest,
    NotEnoughMemory,
    Recipe,
    Relay,
    RelayOutput,
    RelayRequest,
    RequestError,
    ZImageOutput,
    ZImagePipeline,
    read_recipe,
)
from zimage.output import collect
from zimage.testing import build_checkpoint, build_controlnet

OPTIONS: dict[str, Any] = {"height": 64, "width": 64, "any_size": True, "num_inference_steps": 4, "seed": 5}
ABOVE = (1.0, 6 * 0.75 / 4.75, 6 * 0.5 / 3.5)
"""The base model's noise levels, of 4 steps, that are above 0.8."""
BELOW = (0.75, 9 / 14, 0.5, 0.3, 0.0)
"""Turbo's, of 8 steps, that are below."""


@pytest.fixture(scope="module")
def folders(base_folder: Path, turbo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model and a Turbo that share all but the transformer."""
    place = tmp_path_factory.mktemp("pair")
    turbo = shutil.copytree(turbo_folder, place / "turbo")
    other = build_checkpoint(place / "other", seed=1)
    shutil.rmtree(turbo / "transformer")
    shutil.copytree(other / "transformer", turbo / "transformer")
    return base_folder, turbo


def load(folders: tuple[Path, Path], **options: Any) -> Relay:
    made = Relay.from_pretrained(*folders, device="cpu", dtype="float32", **options)
    made.base.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def relay(folders: tuple[Path, Path]) -> Relay:
    """A relay that no test changes."""
    return load(folders)


@pytest.fixture(scope="module")
def pipes(folders: tuple[Path, Path]) -> tuple[ZImagePipeline, ZImagePipeline]:
    """The same two models, each loaded by itself."""
    base, turbo = (ZImagePipeline.from_pretrained(folder, device="cpu", dtype="float32") for folder in folders)
    return base, turbo


def latents(relay: Relay, prompt: Any = "a fox", **options: Any) -> Tensor:
    output = relay(prompt, output_type="latent", progress=False, **{"handover": 0.8, **OPTIONS, **options})
    return output[0]


def picture(relay: Relay, prompt: Any = "a fox", **options: Any) -> Any:
    return relay(prompt, progress=False, **{"handover": 0.8, **OPTIONS, **options})[0][0]


def lora(file: Path) -> Path:
    name = "layers.0.attention.to_q.lora"
    save_file({f"{name}_A.weight": torch.ones(2, 64), f"{name}_B.weight": torch.ones(64, 2)}, file)
    return file


def by_hand(pipes: tuple[ZImagePipeline, ZImagePipeline], guidance: float = 4.0, negative: str = "") -> Tensor:
    """Euler's steps along both models' noise levels, with the transformers' own `forward`, diffusers'."""
    base, turbo = pipes
    features = [base.text_encoder.encode(base.text_encoder.tokenize(text, 512)) for text in ("a fox", negative)]
    x = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(OPTIONS["seed"]))

    def predicted(pipe: ZImagePipeline, at: float, caption: Tensor) -> Tensor:
        (answer,) = pipe.transformer([x[0][:, None]], torch.tensor([1 - at]), [caption], return_dict=False)[0]
        return -answer[:, 0][None]

    with torch.no_grad():
        for sigma, following in pairwise((*ABOVE, 0.8)):
            positive, other = (predicted(base, sigma, one) for one in features)
            x = x + (following - sigma) * (positive + guidance * (positive - other))
        for sigma, following in pairwise((0.8, *BELOW)):
            x = x + (following - sigma) * predicted(turbo, sigma, features[0])
    return x


def test_the_base_model_goes_down_to_the_handover_and_turbo_from_there(
    relay: Relay, pipes: tuple[ZImagePipeline, ZImagePipeline]
) -> None:
    for negative in ("", "a very blurry picture"):
        drawn = latents(relay, negative_prompt=negative)
        assert torch.allclose(drawn, by_hand(pipes, negative=negative), rtol=0, atol=2e-4)
    assert not torch.allclose(drawn, latents(relay), rtol=0, atol=1e-2)


def test_at_its_ends_it_is_one_model_alone(relay: Relay, pipes: tuple[ZImagePipeline, ZImagePipeline]) -> None:
    for handover, pipe in zip((0, 1), pipes, strict=True):
        alone = pipe("a fox", progress=False, **OPTIONS)
        output = relay("a fox", handover=handover, progress=False, **OPTIONS)
        assert isinstance(output, ZImageOutput)
        assert output.images[0].tobytes() == alone.images[0].tobytes()  # type: ignore[union-attr]
        assert output.requests == alone.requests  # type: ignore[union-attr]
        assert output.images[0].recipe.turbo is None
        *_, last = relay.stream(GenerationRequest("a fox", **OPTIONS), handover=handover)
        assert last.image is not None
        assert last.image.tobytes() == output.images[0].tobytes()


def test_diversity_is_of_the_whole_schedule_and_of_the_base_model(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def moved(steps: int) -> int:
        asked.append(steps)
        return 1

    monkeypatch.setattr("zimage.denoiser.moved_steps", moved)
    plain = latents(relay, num_inference_steps=16)
    assert asked == []
    assert not torch.equal(latents(relay, num_inference_steps=16, diversity=2.0), plain)
    assert asked == [16]


def test_pipelines_that_were_loaded_apart_draw_the_same(
    relay: Relay, pipes: tuple[ZImagePipeline, ZImagePipeline]
) -> None:
    apart = Relay(*pipes)
    assert apart.plan is None
    assert torch.equal(latents(apart), latents(relay))


def test_each_model_is_evaluated_as_often_as_is_said(
    relay: Relay, count_forwards: Any, pipes: tuple[ZImagePipeline, ZImagePipeline]
) -> None:
    for options, base, turbo in (
        ({}, 6, 5),
        ({"guidance_scale": 0.0}, 3, 5),
        ({"cfg_truncation": 0.1}, 5, 5),
        ({"sampler": "heun"}, 12, 5),
        ({"turbo_steps": 4}, 6, 3),
        ({"handover": 0.2}, 8, 1),
        ({"num_inference_steps": 40, "cache": "balanced"}, 26, 5),
    ):
        relay.base.text_encoder.forget()
        with count_forwards(relay.base) as of_base, count_forwards(relay.turbo) as of_turbo:
            output = relay("a fox", progress=False, **{"handover": 0.8, **OPTIONS, **options})
        assert isinstance(output, RelayOutput)
        assert (of_base["evaluation"], of_turbo["evaluation"]) == (base, turbo)
        assert output.requests[0].evaluations == base + turbo
        assert of_base["text"] == of_turbo["text"] == (1 if "guidance_scale" in options else 2)  # one encoder, shared
        assert of_base["decoding"] == 1


def test_a_request_of_an_output_gives_the_same_bits(relay: Relay) -> None:
    output = relay(["a fox", "an owl"], handover=0.8, turbo_steps=4, progress=False, **{**OPTIONS, "seed": [3, 9]})
    assert isinstance(output, RelayOutput)
    assert [one.base.seed for one in output.requests] == [one.turbo.seed for one in output.requests] == [3, 9]
    again = relay(output.requests, progress=False)
    for one, other in zip(output.images, again[0], strict=True):
        assert one.tobytes() == other.tobytes()
    single = picture(relay, "an owl", turbo_steps=4, seed=9)
    assert single.tobytes() == output.images[1].tobytes() != output.images[0].tobytes()
    assert relay(output.requests[1], progress=False)[0][0].tobytes() == single.tobytes()
    several = latents(relay, num_images_per_prompt=2)
    assert torch.equal(several[1:], latents(relay, seed=6))


def test_noise_and_features_may_be_given(relay: Relay) -> None:
    expected = latents(relay, negative_prompt="blurry")
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(5))
    assert torch.equal(latents(relay, negative_prompt="blurry", seed=None, latents=noise), expected)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(latents(relay, negative_prompt="blurry", seed=None, generator=generator), expected)
    encoder = relay.base.text_encoder
    given = {
        name: encoder.encode(encoder.tokenize(text, 512))
        for name, text in (("prompt_embeds", "a fox"), ("negative_prompt_embeds", "blurry"))
    }
    assert torch.equal(latents(relay, None, **given), expected)
    with pytest.raises(RequestError, match="made from tensors"):
        relay.replay(picture(relay, None, **given))


def test_a_stream_counts_through_and_ends_with_the_picture(relay: Relay) -> None:
    request = GenerationRequest("a fox", **OPTIONS)
    steps = list(relay.stream(request, handover=0.8))
    assert [(step.index, step.total) for step in steps] == [(index, 8) for index in range(8)]
    assert [step.sigma for step in steps] == pytest.approx([*ABOVE, 0.8, *BELOW[:-1]])
    assert [step.sigma_next for step in steps] == pytest.approx([*ABOVE[1:], 0.8, *BELOW])
    assert [step.request.variant for step in steps] == ["base"] * 3 + ["turbo"] * 5
    assert [step.image is None for step in steps] == [True] * 7 + [False]
    assert steps[-1].image is not None
    assert steps[-1].image.tobytes() == picture(relay).tobytes()
    assert steps[0].preview().size == (8, 8)


def test_streams_that_take_turns_do_not_see_each_other(relay: Relay) -> None:
    def run(seed: int) -> Iterator[Any]:
        return relay.stream(GenerationRequest("a fox", **{**OPTIONS, "seed": seed}), handover=0.8)

    pairs = list(zip(run(5), run(6), strict=True))
    for place, seed in enumerate((5, 6)):
        assert torch.equal(pairs[-1][place].latents, latents(relay, seed=seed))
    assert set(relay.turbo._turn._locks) & set(relay.base._turn._locks)


def test_a_callback_sees_every_step_and_may_change_it(relay: Relay) -> None:
    seen: list[tuple[int, str, int]] = []

    def watch(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, pipe.variant.name, round(float(timestep))))
        return {"latents": tensors["latents"] * (0.5 if index == 2 else 1.0)}

    changed = latents(relay, callback_on_step_end=watch)
    assert seen == [
        (index, "base" if index < 3 else "turbo", round(1000 * sigma))
        for index, sigma in enumerate([*ABOVE, 0.8, *BELOW[:-1]])
    ]
    assert not torch.allclose(changed, latents(relay), rtol=0, atol=1e-2)
    recipe = picture(relay, callback_on_step_end=watch).recipe
    assert recipe.given == ("latents",)
    with pytest.raises(RequestError, match="given to the call or changed by its callback"):
        relay.replay(recipe)

    for at in (1, 6):

        def stop(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any], at: int = at) -> None:
            pipe._interrupt = index == at

        with pytest.raises(Cancelled, match=f"the callback stopped the picture after step {at + 1}"):
            latents(relay, callback_on_step_end=stop)
    with pytest.raises(RequestError, match="callback_on_step_end must be callable"):
        latents(relay, callback_on_step_end="print")
    with pytest.raises(RequestError, match="tensor_inputs"):
        latents(relay, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["pixels"])


def test_it_is_cancelled_between_steps_of_either_model(relay: Relay) -> None:
    for last in (0, 2, 5):
        event = threading.Event()
        stream = relay.stream(GenerationRequest("a fox", **OPTIONS), handover=0.8, cancel=event)
        assert [next(stream).index for _ in range(last + 1)] == list(range(last + 1))
        event.set()
        with pytest.raises(Cancelled):
            next(stream)


def test_its_picture_carries_both_recipes_and_is_made_again(relay: Relay, tmp_path: Path) -> None:
    drawn = picture(relay, negative_prompt="blurry", turbo_steps=4)
    drawn.save(tmp_path / "fox.png")
    recipe = read_recipe(tmp_path / "fox.png")
    assert recipe == drawn.recipe
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.turbo is not None
    assert (recipe.request.variant, recipe.turbo.request.variant, recipe.handover) == ("base", "turbo", 0.8)
    assert recipe.request.negative_prompt == "blurry"
    assert recipe.turbo.request.num_inference_steps == 4
    fingerprints = [pipe.model["fingerprint"] for pipe in (relay.base, relay.turbo)]
    assert [recipe.model["fingerprint"], recipe.turbo.model["fingerprint"]] == fingerprints
    assert len(set(fingerprints)) == 2
    replayed = relay.replay(tmp_path / "fox.png")
    assert replayed.same_bits
    assert replayed.differences == ()
    assert replayed.image.tobytes() == drawn.tobytes()


def test_a_replay_says_what_is_not_as_it_was(relay: Relay) -> None:
    recipe = picture(relay).recipe
    turbo = replace(recipe.turbo, model={**recipe.turbo.model, "fingerprint": "0" * 32, "source": ""})
    replayed = relay.replay(replace(recipe, turbo=turbo))
    assert replayed.same_bits
    assert replayed.differences == (
        f"turbo's model fingerprint was {'0' * 32}, here it is {relay.turbo.model['fingerprint']}",
    )


def test_one_model_refuses_the_picture_of_two_and_the_other_way_round(relay: Relay, tmp_path: Path) -> None:
    recipe = picture(relay).recipe
    for pipe in (relay.base, relay.turbo):
        with pytest.raises(RequestError, match=r"made by a relay of two models.*Relay.from_pretrained"):
            pipe.replay(recipe)
    alone = relay.turbo("a fox", progress=False, **OPTIONS).images[0]  # type: ignore[union-attr]
    with pytest.raises(RequestError, match=r"made by turbo alone; relay\.turbo\.replay"):
        relay.replay(alone)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"handover": 1.2}, "handover must be a number from 0 to 1"),
        ({"handover": "half"}, "handover must be a number"),
        ({"handover": 0, "turbo_steps": 4}, "with handover=0 there is one model"),
        ({"handover": 1, "turbo_steps": 4}, "with handover=1 there is one model"),
        ({"handover": 1, "negative_prompt": "blurry"}, "no effect on Z-Image-Turbo"),
        ({"handover": 0.9, "num_inference_steps": None, "sigmas": [0.5, 0.2]}, "base part has no step"),
        ({"turbo_steps": 0}, "turbo_steps must be a whole number from 1"),
        ({"controlnet": 1}, "no option controlnet"),
        ({"image": torch.zeros(3, 64, 64)}, "starts from noise and image is given"),
        ({"hires": 2}, "makes no second pass and hires is given"),
        ({"output_type": "jpeg"}, "output_type must be one of"),
        ({"cancel": True}, "cancel must be an event"),
    ],
)
def test_what_cannot_work_is_refused(relay: Relay, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        picture(relay, **options)


def test_a_resolved_request_leaves_nothing_to_say(relay: Relay) -> None:
    request = relay.resolve(GenerationRequest("a fox", **OPTIONS), handover=0.8)
    assert relay.resolve(request) == request
    for options in ({"handover": 0.9}, {"handover": 1}, {"turbo_steps": 4}, {"seed": 7}, {"num_images_per_prompt": 2}):
        with pytest.raises(RequestError, match="a RelayRequest says all there is"):
            relay(request, progress=False, **options)
    for level in (1, 0.5):
        with pytest.raises(RequestError, match="a RelayRequest says all there is"):
            relay.stream(request, handover=level)
    for wrong in (["a fox"], None):
        for start in (relay.stream, relay.resolve):
            with pytest.raises(RequestError, match="request must be a request or a text, got "):
                start(wrong)  # type: ignore[operator]
    generator = torch.Generator()
    before = generator.get_state()
    for call in (relay.stream, partial(relay, generator=generator)):
        with pytest.raises(RequestError, match="cancel must be an event"):
            call("a fox", cancel=True)  # type: ignore[operator]
    assert torch.equal(generator.get_state(), before)
    with pytest.raises(RequestError, match="was resolved for base"):
        relay(RelayRequest(request.base, request.base, 0.8), progress=False)


def test_each_models_adapters_act_in_its_part(folders: tuple[Path, Path], tmp_path: Path) -> None:
    relay = load(folders)
    plain, base = picture(relay), relay.base("a fox", progress=False, **OPTIONS)
    relay.turbo.load_adapter(lora(tmp_path / "ink.safetensors"))
    inked = picture(relay)
    assert inked.tobytes() != plain.tobytes()
    assert relay.base("a fox", progress=False, **OPTIONS)[0][0].tobytes() == base[0][0].tobytes()
    assert inked.recipe.adapters == {}
    assert set(inked.recipe.turbo.adapters) == {"ink"}
    assert relay.replay(inked).same_bits
    relay.turbo.delete_adapters("ink")
    with pytest.raises(AdapterError, match="made with the adapter 'ink'"):
        relay.replay(inked)
    assert picture(relay).tobytes() == plain.tobytes()
    relay.close()
    for pipe in (relay.base, relay.turbo):
        with pytest.raises(RequestError, match="was closed"):
            pipe("a fox", progress=False, **OPTIONS)


def test_memory_that_runs_out_in_turbos_part_is_done_without(
    folders: tuple[Path, Path], relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(folders) as tight:
        denoise, failures = tight.turbo.transformer.denoise, iter([True, True])

        def runs_out(*given: Any, **named: Any) -> Tensor:
            if next(failures, False):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
            return denoise(*given, **named)

        monkeypatch.setattr(tight.turbo.transformer, "denoise", runs_out)
        output = tight("a fox", handover=0.8, output_type="latent", progress=False, **OPTIONS)
        assert isinstance(output, RelayOutput)
        (said,) = output.stepped_down
        assert "denoising ran out of memory at 64x64" in said
        assert tight.turbo.plan is not None
        assert tight.turbo.plan.stepped_down == (said,)
        assert torch.equal(output.images, latents(relay))


@pytest.mark.parametrize("handover", [0.0, 0.8])
def test_memory_that_runs_out_while_pictures_are_stacked_is_done_without(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, handover: float
) -> None:
    """By one model alone as by both."""
    failures = iter([True, True])

    def runs_out(*given: Any) -> Any:
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
        return collect(*given)

    monkeypatch.setattr("zimage.recorded.collect", runs_out)
    with load(folders) as tight:
        output = tight("a fox", handover=handover, output_type="np", progress=False, **OPTIONS)
    assert isinstance(output, RelayOutput if handover else ZImageOutput)
    assert len(output.stepped_down) == 1
    assert "decoding ran out of memory at 64x64" in output.stepped_down[0]
    assert output.images.shape == (1, 64, 64, 3)


def test_a_picture_that_does_not_fit_is_refused(folders: tuple[Path, Path]) -> None:
    with load(folders, memory="24MB") as tight, pytest.raises(NotEnoughMemory, match="does not fit in 24MB"):
        picture(tight, height=1024, width=1024)


def test_other_containers(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = relay("a fox", handover=0.8, output_type="pt", return_dict=False, progress=False, **OPTIONS)
    assert isinstance(pixels, tuple)
    assert pixels[0].shape == (1, 3, 64, 64)
    assert picture(relay, embed_recipe=False).recipe is None
    totals: list[int] = []

    class Bar:
        def __init__(self, total: int, **_: Any) -> None:
            totals.append(total)

        def update(self) -> None:
            totals[-1] -= 1

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    monkeypatch.setattr(relay.base, "_bar_options", {})
    relay("a fox", handover=0.8, **OPTIONS)
    assert totals == [0]


def test_the_defaults_are_those_that_are_documented(relay: Relay, run_json: Callable[[str], Any]) -> None:
    request = relay.resolve(GenerationRequest("a fox", height=64, width=64, any_size=True))
    assert (request.handover, request.base.num_inference_steps, request.turbo.num_inference_steps) == (0.75, 25, 8)
    assert request.evaluations == 38
    assert run_json(picture(relay).recipe.to_json())["relay"]["handover"] == 0.8


@pytest.fixture
def run_json() -> Callable[[str], Any]:
    return json.loads


def test_a_control_image_steers_the_base_models_part(folders: tuple[Path, Path], tmp_path: Path) -> None:
    made = load(folders)
    made.base.load_controlnet(build_controlnet(tmp_path / "net"))
    edges = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"control_image": edges, "controlnet_conditioning_scale": 1.0}
    steered = picture(made, **options)
    assert steered.tobytes() != picture(made).tobytes()
    steered.save(tmp_path / "fox.png")
    assert made.replay(tmp_path / "fox.png", control_image=edges).same_bits
    with pytest.raises(RequestError, match="pass control_image"):
        made.replay(tmp_path / "fox.png")


def test_a_picture_keeps_in_its_recipe_what_acted_in_the_part_that_is_done(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    made = load(folders)
    made.base.load_controlnet(build_controlnet(tmp_path / "net"))
    made.base.load_adapter(lora(tmp_path / "ink.safetensors"), strength=0.5)
    edges = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(0))
    request = made.resolve(GenerationRequest("a fox", **OPTIONS, control_image=edges), handover=0.8)
    expected = made(request, progress=False)[0][0].recipe
    stream = made.stream(request)
    while next(stream).request.variant == "base":
        pass
    made.base.unload_controlnet()
    made.base.load_controlnet(build_controlnet(tmp_path / "other", version="1.0"))
    made.base.delete_adapters("ink")
    image = [*stream][-1].image
    assert image is not None
    assert image.recipe == expected
    assert expected.controlnet["source"].endswith("net")
    assert set(expected.adapters) == {"ink"}
    made.turbo.load_adapter(tmp_path / "ink.safetensors")
    made.base.load_adapter(tmp_path / "ink.safetensors")
    stream = made.stream(made.resolve(GenerationRequest("a fox", **OPTIONS), handover=0.8))
    next(stream)
    made.turbo.delete_adapters("ink")
    with pytest.raises(AdapterError, match="the adapter 'ink' was deleted while a picture was made with it"):
        list(stream)
