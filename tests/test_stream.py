"""A stream is the same picture, one denoising step at a time: nothing runs ahead, and closing it leaves no trace."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from zimage import GenerationRequest, RequestError, Step, ZImagePipeline
from zimage.files.recipe import pixel_digest
from zimage.sampling.schedule import shifted_sigmas

from .conftest import CountForwards


def asked(prompt: str = "a fox", seed: int = 7, steps: int = 4, **more: Any) -> GenerationRequest:
    options = {"height": 64, "width": 64, **more}
    return GenerationRequest(prompt, seed=seed, num_inference_steps=steps, any_size=True, **options)


def image_of(pipe: ZImagePipeline, request: GenerationRequest) -> str:
    return pixel_digest(pipe(request).images[0])


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_steps_are_counted_and_the_last_has_the_image(base: ZImagePipeline, sampler: str) -> None:
    request = asked(sampler=sampler)
    steps = list(base.stream(request))
    sigmas = shifted_sigmas(4, 6.0).tolist()
    assert [(step.index, step.total) for step in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [(step.sigma, step.sigma_next) for step in steps] == list(pairwise(sigmas))
    assert (sigmas[0], sigmas[-1]) == (1.0, 0.0)
    assert [step.image is None for step in steps] == [True, True, True, False]
    assert {step.latents.shape for step in steps} == {(1, 16, 8, 8)}
    assert {step.request for step in steps} == {base.resolve(request)}
    assert torch.equal(steps[-1].latents, base(request, output_type="latent").images)
    assert torch.equal(steps[-1].denoised, steps[-1].latents)
    assert pixel_digest(steps[-1].image) == image_of(base, request)


def test_sigmas_that_were_given_are_shifted(turbo: ZImagePipeline) -> None:
    steps = list(turbo.stream(asked(steps=2, sigmas=[0.9, 0.25])))
    assert [step.sigma for step in steps] == pytest.approx([2.7 / 2.8, 0.75 / 1.5])
    assert [step.sigma_next for step in steps] == [steps[1].sigma, 0.0]


def test_every_step_can_be_looked_at(turbo: ZImagePipeline) -> None:
    """`denoised` is the picture expected so far: it decodes, and it approaches the final one."""
    steps = list(turbo.stream(asked(steps=6)))
    previews = [turbo.autoencoder.decode(step.denoised) for step in steps]
    assert {preview.shape for preview in previews} == {(1, 3, 64, 64)}
    distances = [float((step.denoised - steps[-1].latents).norm()) for step in steps]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0.0


def test_a_text_is_enough(turbo: ZImagePipeline) -> None:
    step = next(turbo.stream("a fox"))
    assert (step.total, step.latents.shape, step.request.prompt) == (8, (1, 16, 128, 128), "a fox")
    assert replace(turbo.resolve("a fox"), seed=7) == turbo.resolve(GenerationRequest("a fox", seed=7))


@pytest.mark.parametrize("wrong", [["a fox"], [GenerationRequest("a fox")], {"prompt": "a fox"}, None, b"a fox"])
def test_what_is_no_request_is_refused_at_once(turbo: ZImagePipeline, wrong: Any) -> None:
    for start in (turbo.stream, turbo.resolve):
        with pytest.raises(RequestError, match=r"request must be a request or a text, got .*; pass a GenerationRequ"):
            start(wrong)


def test_nothing_runs_ahead(base: ZImagePipeline, count_forwards: CountForwards) -> None:
    with count_forwards(base) as forwards:
        stream = base.stream(asked())
        assert forwards["any"] == 0
        for done in range(1, 4):
            next(stream)
            assert (forwards["evaluation"], forwards["decoding"]) == (2 * done, 0)
        next(stream)
        assert (forwards["evaluation"], forwards["decoding"]) == (8, 1)
        assert next(stream, None) is None
        assert forwards["evaluation"] == 8


def test_a_wrong_request_is_refused_at_once(turbo: ZImagePipeline) -> None:
    with pytest.raises(RequestError, match="guidance_scale must be 0 for Z-Image-Turbo"):
        turbo.stream(GenerationRequest("a fox", guidance_scale=4))
    with pytest.raises(RequestError, match="cancel must be an event"):
        turbo.stream("a fox", cancel=True)  # type: ignore[arg-type]


def test_closing_stops_the_work(turbo: ZImagePipeline, count_forwards: CountForwards) -> None:
    expected = image_of(turbo, asked())
    stream = turbo.stream(asked(steps=500))
    next(stream)
    with count_forwards(turbo) as forwards:
        stream.close()
        with pytest.raises(StopIteration):
            next(stream)
        assert forwards["any"] == 0
    assert image_of(turbo, asked()) == expected


def test_streams_may_interleave(base: ZImagePipeline) -> None:
    """Of different prompts, guidance, sizes, lengths and samplers, with a whole call between their steps."""
    requests = [
        asked("a fox", seed=1, steps=3, sampler="dpmpp_2m"),
        asked("a cat", seed=2, steps=5, guidance_scale=0, height=96),
        asked("a fox", seed=1, steps=4, negative_prompt="blurry", cfg_normalization=True),
    ]
    expected = [image_of(base, request) for request in requests]
    running = dict(enumerate(map(base.stream, requests)))
    last: dict[int, Step] = {}
    while running:
        for index, stream in list(running.items()):
            step = next(stream, None)
            if step is None:
                del running[index]
            else:
                last[index] = step
            base(asked("a dog", steps=1), output_type="latent")
    assert [pixel_digest(last[index].image) for index in range(3)] == expected
    assert [last[index].image.recipe.request for index in range(3)] == [base.resolve(request) for request in requests]


def test_a_stream_that_waits_keeps_nobody_waiting(turbo: ZImagePipeline) -> None:
    expected = image_of(turbo, asked("a cat"))
    stream = turbo.stream(asked())
    next(stream)
    made: list[str] = []
    other = threading.Thread(target=lambda: made.append(image_of(turbo, asked("a cat"))), daemon=True)
    other.start()
    other.join(timeout=60)
    assert made == [expected]
    assert [step.index for step in stream] == [1, 2, 3]


def test_a_pipeline_that_is_converted_meanwhile(own_turbo: ZImagePipeline) -> None:
    stream = own_turbo.stream(asked())
    next(stream)
    own_turbo.to(torch.bfloat16)
    with pytest.raises(RequestError, match="was moved or converted while a picture was made with it; draw that again"):
        next(stream)
    assert own_turbo(asked()).images
    stream = own_turbo.stream(asked())
    next(stream)
    own_turbo.to(torch.float32).to(torch.bfloat16)
    assert [step.index for step in stream] == [1, 2, 3]


def test_a_pipeline_that_another_thread_closes_meanwhile(turbo_folder: Path) -> None:
    pipe = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu")
    began, closed = threading.Event(), threading.Event()
    outcome: list[Exception] = []

    def wait(*_: Any) -> None:
        began.set()
        assert closed.wait(timeout=60)

    def draw() -> None:
        try:
            pipe(asked(), callback_on_step_end=wait)
        except Exception as error:
            outcome.append(error)

    drawing = threading.Thread(target=draw)
    drawing.start()
    assert began.wait(timeout=60)
    with pipe._turn:  # the drawing thread asks for its turn before the pipeline is closed, and gets it after
        closed.set()
        drawing.join(timeout=0.5)
        pipe.close()
    drawing.join(timeout=60)
    assert [(type(error), str(error)) for error in outcome] == [
        (RequestError, "this pipeline was closed; load it again")
    ]


def test_the_image_carries_its_recipe_unless_told_otherwise(turbo: ZImagePipeline) -> None:
    *_, last = turbo.stream(asked())
    assert last.image.recipe.request == turbo.resolve(asked())
    assert last.image.recipe.pixels == pixel_digest(last.image)
    *_, last = turbo.stream(asked(), embed_recipe=False)
    assert last.image.recipe is None


def test_a_backend_that_is_set_meanwhile_is_named_beside_the_first(own_turbo: ZImagePipeline) -> None:
    steps = own_turbo.stream(asked())
    next(steps)
    own_turbo.set_attention_backend("_native_math")
    *_, last = steps
    assert last.image.recipe.runtime["attention"] == "native, then _native_math"
    assert own_turbo.replay(last.image.recipe).differences == (
        "attention was native, then _native_math, here it is _native_math",
    )
