"""diffusers' step callback: called with the same things, allowed the same changes, with the same effect.

Effects are compared with diffusers running the very same callback over the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from zimage import Cancelled, RequestError, ZImagePipeline
from zimage.callbacks import CALLBACK_TENSORS, PipelineHandle
from zimage.files.recipe import pixel_digest

from .conftest import CountForwards

Tensors = dict[str, Any]
Callback = Callable[[Any, int, Any, Tensors], Any]
SIZE: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def theirs(base_folder: Path) -> Any:
    pipe = diffusers.ZImagePipeline.from_pretrained(base_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: ZImagePipeline, callback: Callback | None = None, **options: Any) -> torch.Tensor:
    return pipe("a fox", **SIZE, any_size=True, seed=3, output_type="latent", callback_on_step_end=callback, **options)[
        0
    ]


def scale_latents(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
    return {"latents": tensors["latents"] * 0.9}


def scale_latents_in_place(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
    tensors["latents"].mul_(0.9)
    return {}


def replace_features_once(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
    if step != 1:
        return tensors
    return {**tensors, "prompt_embeds": [embeds.flip(0) * 1.5 for embeds in tensors["prompt_embeds"]]}


def shorten_both_features(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: [embeds[:-1] for embeds in tensors[name]] for name in names}


def change_everything(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
    changed = replace_features_once(pipe, step, timestep, tensors)
    return {**changed, **scale_latents(pipe, step, timestep, tensors)}


def change_nothing(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
    return tensors


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize(
    ("callback", "has_effect"),
    [
        (scale_latents, True),
        (scale_latents_in_place, True),
        (replace_features_once, True),
        (shorten_both_features, True),
        (change_everything, True),
        (change_nothing, False),
    ],
)
def test_a_callback_has_the_effect_it_has_in_diffusers(
    callback: Callback, has_effect: bool, guidance: float, base: ZImagePipeline, theirs: Any
) -> None:
    options: dict[str, Any] = {"guidance_scale": guidance, "callback_on_step_end_tensor_inputs": list(CALLBACK_TENSORS)}
    ours = drawn(base, callback, **options)
    reference = theirs(
        "a fox",
        **SIZE,
        **options,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        callback_on_step_end=lambda *given: dict(callback(*given)),
    )[0]
    assert float((ours - reference).abs().max()) < 1e-5 * float(reference.abs().max())
    plain = drawn(base, guidance_scale=guidance)
    assert torch.equal(ours, plain) is not has_effect


def test_a_callback_is_called_after_each_step_of_each_image(base: ZImagePipeline, theirs: Any) -> None:
    def recording(calls: list[Any]) -> Callback:
        def record(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
            calls.append((step, timestep, sorted(tensors)))
            return {}

        return record

    ours: list[Any] = []
    reference: list[Any] = []
    drawn(base, recording(ours), num_images_per_prompt=2)
    theirs("a fox", **SIZE, output_type="latent", callback_on_step_end=recording(reference))
    assert [(step, names) for step, _, names in ours] == 2 * [(step, ["latents"]) for step in range(4)]
    assert [(step, names) for step, _, names in reference] == [(step, names) for step, _, names in ours[:4]]
    for (_, timestep, _), (_, expected, _) in zip(ours[:4], reference, strict=True):
        assert isinstance(timestep, torch.Tensor)
        assert timestep.shape == expected.shape == ()
        assert float(timestep) == pytest.approx(float(expected), rel=1e-6)


def test_a_callback_sees_what_it_asked_for(base: ZImagePipeline) -> None:
    seen: list[Tensors] = []

    def record(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> None:
        assert pipe.variant is base.variant
        assert pipe.transformer is base.transformer
        assert pipe.dtype == torch.float32
        seen.append(tensors)

    latents = drawn(base, record, callback_on_step_end_tensor_inputs=list(CALLBACK_TENSORS))
    steps = list(base.stream(base("a fox", **SIZE, any_size=True, seed=3).requests[0]))
    assert [torch.equal(one["latents"], step.latents) for one, step in zip(seen, steps, strict=True)] == [True] * 4
    assert torch.equal(seen[-1]["latents"], latents)
    encoder = base.text_encoder
    for name, text in (("prompt_embeds", "a fox"), ("negative_prompt_embeds", "")):
        (features,) = seen[0][name]
        assert torch.equal(features, encoder.encode(encoder.tokenize(text, 512)))
    drawn(base, record, guidance_scale=0, callback_on_step_end_tensor_inputs=["negative_prompt_embeds"])
    assert seen[-1] == {"negative_prompt_embeds": []}


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("answer", [None, {}, "what it was given", "equal latents"])
def test_a_callback_that_changes_nothing_leaves_the_bits(base: ZImagePipeline, sampler: str, answer: Any) -> None:
    def callback(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Any:
        if answer == "equal latents":
            return {"latents": tensors["latents"].clone()}
        return tensors if isinstance(answer, str) else answer

    names = list(CALLBACK_TENSORS)
    looked_at = drawn(base, callback, sampler=sampler, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(looked_at, drawn(base, sampler=sampler))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_replaced_latents_are_where_the_next_step_starts(base: ZImagePipeline, sampler: str) -> None:
    """After the last step they are the picture."""
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    options = {"sampler": sampler}
    assert torch.equal(drawn(base, lambda *_: {"latents": noise}, **options), noise)
    restarted = drawn(base, lambda _, step, *__: {"latents": noise} if step == 0 else None, **options)
    assert not torch.equal(restarted, drawn(base, **options))
    assert torch.isfinite(restarted).all()


@pytest.mark.parametrize("around", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize("way", ["numpy", "data", "method"])
def test_latents_changed_in_place_are_as_if_returned(
    base: ZImagePipeline, way: str, around: Callable[[], AbstractContextManager[Any]]
) -> None:
    """To a solver too that remembers the step before, which did not lead to them; and the recipe says so."""

    def halve(latents: torch.Tensor) -> None:
        if way == "numpy":
            latents.numpy()[...] *= 0.5
        else:
            (latents.data if way == "data" else latents).mul_(0.5)

    def in_place(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> None:
        if step == 1:
            halve(tensors["latents"])

    def returned(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Any:
        return {"latents": tensors["latents"] * 0.5} if step == 1 else None

    def digest(callback: Callback) -> str:
        output = base("a fox", **SIZE, any_size=True, seed=3, sampler="dpmpp_2m", callback_on_step_end=callback)
        assert output.images[0].recipe.given == ("latents",)
        return pixel_digest(output.images[0])

    expected = digest(returned)
    with around():
        assert digest(in_place) == expected


def test_features_changed_in_place_count_for_this_call_alone(base: ZImagePipeline) -> None:
    """As in diffusers, whose callbacks hold the run's own tensors; here the text cache holds them too."""
    names = ["prompt_embeds"]

    def double(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> None:
        tensors["prompt_embeds"][0].mul_(2.0 if step == 0 else 1.0)

    def replace(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        return {"prompt_embeds": tensors["prompt_embeds"][0] * (2.0 if step == 0 else 1.0)}

    before = drawn(base)
    in_place = drawn(base, double, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(in_place, drawn(base, replace, callback_on_step_end_tensor_inputs=names))
    assert not torch.equal(in_place, before)
    assert torch.equal(drawn(base), before)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"latents": torch.zeros(1, 16, 8, 8)}, r"latents \(1, 16, 8, 8\); they must be a tensor \(1, 16, 8, 12\)"),
        ({"latents": [[0.0]]}, "the callback returned latents list; they must be a tensor"),
        ({"latents": torch.full((1, 16, 8, 12), float("nan"))}, "latents that are not finite"),
        ({"prompt_embeds": torch.zeros(5, 63)}, r"prompt_embeds that are not one tensor \(tokens, 64\)"),
        ({"prompt_embeds": torch.zeros(5, 64).int()}, "prompt_embeds that are not"),
        ({"prompt_embeds": torch.zeros(0, 64)}, "prompt_embeds that are not"),
        ({"prompt_embeds": torch.full((5, 64), float("inf"))}, "prompt_embeds that are not"),
        ({"prompt_embeds": None}, "prompt_embeds that are not one tensor"),
        ({"negative_prompt_embeds": [torch.zeros(5, 64)] * 2}, "negative_prompt_embeds that are not one tensor"),
        ("latents", "the callback returned str"),
        (True, "the callback returned bool"),
        (torch.zeros(1, 16, 8, 12), "the callback returned Tensor"),
    ],
)
def test_an_answer_that_cannot_be_used_is_a_request_error(
    base: ZImagePipeline, answer: Any, says: str, count_forwards: CountForwards
) -> None:
    before = drawn(base)
    with count_forwards(base) as forwards, pytest.raises(RequestError, match=says):
        drawn(base, lambda *_: answer)
    assert forwards["evaluation"] == 2
    assert torch.equal(drawn(base), before)


def test_an_error_in_a_callback_reaches_the_caller_and_leaves_the_pipeline_usable(base: ZImagePipeline) -> None:
    before = drawn(base)

    def fail(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> None:
        if step == 2:
            raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            drawn(base, fail)
    assert torch.equal(drawn(base), before)


def test_a_callback_may_use_the_pipeline_itself(base: ZImagePipeline) -> None:
    inner: list[torch.Tensor] = []

    def nested(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> None:
        inner.append(drawn(base))

    assert torch.equal(drawn(base, nested), inner[0])
    assert len(inner) == 4


@pytest.mark.parametrize("stop", ["_interrupt", "cancel"])
def test_a_callback_can_stop_its_own_call(base: ZImagePipeline, stop: str, count_forwards: CountForwards) -> None:
    before = drawn(base)
    handles: list[Any] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        handles.append(pipe)
        if step == 1 and stop == "_interrupt":
            pipe._interrupt = True
        elif step == 1:
            pipe.cancel()
        return tensors

    with count_forwards(base) as forwards, pytest.raises(Cancelled, match="stopped the picture after step 2"):
        drawn(base, callback, num_images_per_prompt=2)
    assert (len(handles), forwards["evaluation"]) == (2, 4)
    assert not base._interrupt
    assert torch.equal(drawn(base, lambda *_: None), before)


def test_what_a_callback_is_given_can_be_copied(base: ZImagePipeline) -> None:
    handle = copy.copy(PipelineHandle(base))
    handle.cancel()
    assert handle.transformer is base.transformer
    assert (handle._interrupt, base._interrupt) == (True, False)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = handle.nothing


def test_the_pipeline_itself_is_not_stopped(base: ZImagePipeline) -> None:
    """It draws for all callers; diffusers' scripts set this on it, which would do nothing."""
    with pytest.raises(RequestError, match=r"first argument of the callback.*cancel=threading\.Event\(\)"):
        base._interrupt = True
    base._interrupt = False


@pytest.mark.parametrize(
    ("callback", "names", "changed"),
    [
        (scale_latents, ["latents"], ("latents",)),
        (scale_latents_in_place, ["latents"], ("latents",)),
        (replace_features_once, ["prompt_embeds"], ("prompt_embeds",)),
        (shorten_both_features, [*CALLBACK_TENSORS], ("prompt_embeds", "negative_prompt_embeds")),
        (lambda pipe, step, timestep, tensors: tensors, [*CALLBACK_TENSORS], ()),
        (lambda pipe, step, timestep, tensors: {"latents": tensors["latents"].clone()}, ["latents"], ()),
    ],
)
def test_a_recipe_says_what_a_callback_changed(
    base: ZImagePipeline, callback: Callback, names: list[str], changed: tuple[str, ...]
) -> None:
    """And a picture after it, whose callback did nothing, is its recipe's again."""
    first = 3

    def once(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Any:
        nonlocal first
        first -= step == 3
        return callback(pipe, step, timestep, tensors) if first == 3 else None

    options: dict[str, Any] = {**SIZE, "any_size": True, "num_images_per_prompt": 2}
    images = base("a fox", **options, callback_on_step_end=once, callback_on_step_end_tensor_inputs=names).images
    assert [image.recipe.given for image in images] == [changed, ()]
    assert base.replay(images[1].recipe).same_bits
    if changed:
        with pytest.raises(RequestError, match=rf"does not hold \({', '.join(changed)}\), given to the call or"):
            base.replay(images[0].recipe)


def test_the_finished_picture_is_that_of_the_changed_latents(base: ZImagePipeline) -> None:
    options: dict[str, Any] = {**SIZE, "any_size": True, "seed": 3}
    output = base("a fox", **options, callback_on_step_end=scale_latents)
    expected = base.autoencoder.decode(drawn(base, scale_latents))
    pixels = base("a fox", **options, callback_on_step_end=scale_latents, output_type="pt").images
    assert torch.equal(pixels, expected)
    assert pixel_digest(output.images[0]) != pixel_digest(base("a fox", **options).images[0])
