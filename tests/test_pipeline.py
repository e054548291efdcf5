"""One call does the job: the containers of each output type, one seed per image, diffusers' arguments, and no traces.

What is compared bit for bit is compared by `pixel_digest` or `torch.equal`; networks are tiny and random.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from zimage import GenerationRequest, RequestError, ZImageOutput, ZImagePipeline, ZImageWarning
from zimage.files.recipe import pixel_digest
from zimage.models.text_encoder import CACHED_PROMPTS

from .conftest import CountForwards

Options = dict[str, Any]
LONG = "a red fox sitting in the snow, soft morning light, and behind it " + "a wooden house, " * 12 + "a blue door"


def digests(output: ZImageOutput) -> list[str]:
    return [pixel_digest(image) for image in output.images]


def test_pil_is_a_list_of_rgb_images(turbo: ZImagePipeline) -> None:
    output = turbo(["a", "b"], 96, 64, 2, any_size=True, seed=1)
    assert [(type(image).__mro__[1], image.mode, image.size) for image in output.images] == [
        (Image.Image, "RGB", (64, 96))
    ] * 2
    assert len(output.requests) == 2
    assert output[0] is output.images
    assert len({*digests(output)}) == 2


def test_other_output_types_hold_the_same_pictures(turbo: ZImagePipeline, small: Options) -> None:
    call = {"prompt": ["a", "b"], **small, "height": 96, "seed": 1}
    as_pil, as_np, as_pt, as_latent = (turbo(**call, output_type=kind).images for kind in ("pil", "np", "pt", "latent"))
    assert (as_np.shape, as_np.dtype) == ((2, 96, 64, 3), np.float32)
    assert (as_pt.shape, as_pt.dtype) == ((2, 3, 96, 64), torch.float32)
    assert (as_latent.shape, as_latent.dtype) == ((2, 16, 12, 8), torch.float32)
    assert 0 <= as_np.min() < 0.3
    assert 0.7 < as_np.max() <= 1
    assert np.array_equal(as_np, as_pt.permute(0, 2, 3, 1).numpy())
    for image, pixels in zip(as_pil, as_np, strict=True):
        assert np.array_equal(np.asarray(image), np.rint(pixels * 255).astype(np.uint8))
    decoded = torch.cat([turbo.autoencoder.decode(latents[None]) for latents in as_latent])
    assert torch.equal(decoded, as_pt)


def test_return_dict_false_gives_a_tuple(turbo: ZImagePipeline, small: Options) -> None:
    full = turbo("a", **small, seed=1)
    (images,) = turbo("a", **small, seed=1, return_dict=False)
    assert [pixel_digest(image) for image in images] == digests(full)


def test_image_k_has_the_seed_plus_k(turbo: ZImagePipeline, small: Options) -> None:
    output = turbo("a fox", **small, seed=40, num_images_per_prompt=3)
    assert [request.seed for request in output.requests] == [40, 41, 42]
    alone = [digests(turbo("a fox", **small, seed=seed))[0] for seed in (40, 41, 42)]
    assert digests(output) == alone
    assert len(set(alone)) == 3


def test_prompts_and_their_images_are_in_order(base: ZImagePipeline, small: Options) -> None:
    negatives = ["blurry", "text"]
    output = base(["a", "b"], **small, negative_prompt=negatives, seed=5, num_images_per_prompt=2)
    assert [(one.prompt, one.negative_prompt, one.seed) for one in output.requests] == [
        ("a", "blurry", 5),
        ("a", "blurry", 6),
        ("b", "text", 7),
        ("b", "text", 8),
    ]
    for index, (prompt, negative) in enumerate([("a", "blurry"), ("a", "blurry"), ("b", "text"), ("b", "text")]):
        assert digests(base(prompt, **small, negative_prompt=negative, seed=5 + index)) == [digests(output)[index]]


def test_a_seed_for_each_image(turbo: ZImagePipeline, small: Options) -> None:
    output = turbo(["a", "b"], **small, seed=[9, 2])
    assert digests(output) == [digests(turbo(text, **small, seed=seed))[0] for text, seed in (("a", 9), ("b", 2))]


def test_a_request_of_a_call_makes_its_image_again(base: ZImagePipeline, small: Options) -> None:
    output = base(["a", "b"], **small, negative_prompt="x", guidance_scale=2.5, cfg_normalization=True, sampler="heun")
    for request, digest in zip(output.requests, digests(output), strict=True):
        assert digests(base(request)) == [digest]
        assert digests(base(request.reopen())) == [digest]
        *_, last = base.stream(request)
        assert pixel_digest(last.image) == digest
    again = base(output.requests)
    assert digests(again) == digests(output)
    assert again.requests == output.requests


def test_requests_of_several_sizes_in_one_call(turbo: ZImagePipeline) -> None:
    requests = [GenerationRequest("a", height=side, width=64, any_size=True, seed=1) for side in (64, 96, 64)]
    output = turbo(requests)
    assert [image.size for image in output.images] == [(64, 64), (64, 96), (64, 64)]
    assert digests(output)[0] == digests(output)[2]


def test_a_fresh_generator_is_its_seed(turbo: ZImagePipeline, small: Options) -> None:
    output = turbo("a fox", **small, generator=torch.Generator().manual_seed(7))
    assert output.requests[0].seed == 7
    assert not output.requests[0].tensors
    assert digests(output) == digests(turbo("a fox", **small, seed=7))
    assert turbo.replay(output.images[0].recipe).same_bits


def test_one_generator_draws_the_noise_of_all_images(turbo: ZImagePipeline, small: Options) -> None:
    """diffusers' draw, which no single seed repeats: all images but the first carry their noise."""
    generator = torch.Generator().manual_seed(7)
    output = turbo(["a", "b"], **small, generator=generator)
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(7))
    assert [list(request.tensors) for request in output.requests] == [[], ["latents"]]
    assert torch.equal(output.requests[1].tensors["latents"], noise[1:])
    assert digests(turbo(["a", "b"], **small, latents=noise)) == digests(output)
    expected = torch.Generator().manual_seed(7)
    torch.randn(2, 16, 8, 8, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_a_used_generator_works_and_the_recipe_says_that_noise_was_given(turbo: ZImagePipeline, small: Options) -> None:
    generator = torch.Generator().manual_seed(7)
    first, second = (turbo("a fox", **small, generator=generator) for _ in range(2))
    assert digests(first) != digests(second)
    assert first.images[0].recipe.replayable
    recipe = second.images[0].recipe
    assert recipe.given == ("latents",)
    with pytest.raises(RequestError, match="tensors that its recipe does not hold"):
        turbo.replay(recipe)
    assert digests(turbo(second.requests[0])) == digests(second)


def test_a_generator_for_each_image(turbo: ZImagePipeline, small: Options) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 9)]
    output = turbo("a", **small, num_images_per_prompt=2, generator=generators)
    assert [request.seed for request in output.requests] == [3, 9]
    assert digests(output) == digests(turbo(["a", "a"], **small, seed=[3, 9]))


def test_pictures_that_need_more_noise_than_one_draw_have_seeds_of_a_generator(turbo: ZImagePipeline) -> None:
    """What diversity moves is drawn of the seed, so each picture has its own."""
    options: dict[str, Any] = {"height": 64, "width": 64, "any_size": True, "num_inference_steps": 1}
    generator = torch.Generator().manual_seed(5)
    output = turbo("a fox", **options, num_images_per_prompt=3, diversity=2.0, generator=generator)
    seeds = [request.seed for request in output.requests]
    assert (seeds[0], len(set(seeds))) == (5, 3)
    assert digests(turbo("a fox", **options, num_images_per_prompt=3, diversity=2.0, seed=seeds)) == digests(output)
    assert all(image.recipe.replayable for image in output.images)


def test_given_latents_are_the_start(turbo: ZImagePipeline, small: Options) -> None:
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(7))
    output = turbo("a fox", **small, latents=noise)
    assert digests(output) == digests(turbo("a fox", **small, seed=7))
    assert output.requests[0].seed == 0
    assert digests(turbo(GenerationRequest("a fox", **small, latents=noise[0]))) == digests(output)
    assert digests(turbo("a fox", **small, latents=noise.double())) == digests(output)


def test_given_features_are_used_as_they_are(
    base: ZImagePipeline, small: Options, count_forwards: CountForwards
) -> None:
    encoder = base.text_encoder
    positive, negative = (encoder.encode(encoder.tokenize(text, 512)) for text in ("a fox", "blurry"))
    with count_forwards(base) as forwards:
        output = base(prompt_embeds=[positive], negative_prompt_embeds=[negative], **small, seed=1)
    assert forwards["text"] == 0
    assert digests(output) == digests(base("a fox", negative_prompt="blurry", **small, seed=1))
    assert output.images[0].recipe.given == ("prompt_embeds", "negative_prompt_embeds")
    assert digests(base(output.requests[0])) == digests(output)


def test_positions_of_arguments_are_diffusers() -> None:
    theirs = list(inspect.signature(diffusers.ZImagePipeline.__call__).parameters)
    ours = inspect.signature(ZImagePipeline.__call__).parameters
    assert [name for name, argument in ours.items() if argument.kind is argument.POSITIONAL_OR_KEYWORD] == theirs


def test_a_diffusers_script_runs(base: ZImagePipeline, base_folder: Path) -> None:
    theirs = diffusers.ZImagePipeline.from_pretrained(base_folder, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)

    def script(pipe: Any) -> Any:
        return pipe(
            prompt=["a fox", "a long-haired cat on a red sofa"],
            negative_prompt=["blurry", ""],
            height=256,
            width=272,
            num_inference_steps=3,
            guidance_scale=4.0,
            cfg_normalization=True,
            cfg_truncation=0.8,
            generator=torch.Generator("cpu").manual_seed(42),
            max_sequence_length=77,
            output_type="np",
        )[0]

    assert np.abs(script(base) - script(theirs)).max() < 1e-5


def test_positional_arguments(base: ZImagePipeline) -> None:
    """prompt, height, width, num_inference_steps, sigmas, guidance_scale, cfg_normalization, cfg_truncation,
    negative_prompt, num_images_per_prompt, generator."""
    generator = torch.Generator().manual_seed(3)
    output = base("a fox", 256, 272, 2, [1.0, 0.4], 3.0, True, 0.9, "blurry", 1, generator)
    named = GenerationRequest(
        "a fox",
        negative_prompt="blurry",
        height=256,
        width=272,
        num_inference_steps=2,
        sigmas=[1.0, 0.4],
        guidance_scale=3.0,
        cfg_normalization=1.0,
        cfg_truncation=0.9,
        seed=3,
    )
    assert output.requests == (base.resolve(named),)


def test_a_prompt_is_encoded_once(own_turbo: ZImagePipeline, small: Options, count_forwards: CountForwards) -> None:
    with count_forwards(own_turbo) as forwards:
        own_turbo(["a fox", "a cat", "a fox"], **small, num_images_per_prompt=2)
        own_turbo("a cat", **small)
    assert forwards["text"] == 2
    with count_forwards(own_turbo) as forwards:
        for index in range(CACHED_PROMPTS):
            own_turbo(f"{index}", height=32, width=32, any_size=True, num_inference_steps=1, output_type="latent")
        own_turbo("a fox", **small)
    assert forwards["text"] == CACHED_PROMPTS + 1


def test_the_cache_knows_where_a_prompt_is_cut(turbo_folder: Path, turbo: ZImagePipeline, small: Options) -> None:
    def lengths(*kept: int) -> list[GenerationRequest]:
        return [GenerationRequest(LONG, **small, seed=1, max_sequence_length=length) for length in kept]

    with pytest.warns(ZImageWarning, match="this is cut off"):
        whole, cut, whole_again = digests(turbo(lengths(512, 20, 512)))
    with pytest.warns(ZImageWarning, match="this is cut off"):
        (alone,) = digests(turbo(lengths(20)))
    assert whole == whole_again
    assert cut == alone != whole
    fresh = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu")
    assert digests(fresh(lengths(512), progress=False)) == [whole]


def test_a_prompt_that_is_cut_is_warned_of_once(turbo: ZImagePipeline, small: Options) -> None:
    total = turbo.text_encoder.tokenize(LONG, 512).total
    for start in (
        lambda: turbo([LONG, LONG], **small, num_images_per_prompt=2, max_sequence_length=40),
        lambda: turbo.stream(GenerationRequest(LONG, **small, max_sequence_length=40)),
    ):
        with pytest.warns(ZImageWarning) as caught:
            start()
        assert len(caught) == 1
        message = str(caught[0].message)
        assert f"the prompt has {total} tokens with its template, max_sequence_length is 40" in message
        cut = message.split("this is cut off: '")[1].rstrip("'")
        assert LONG.endswith(cut)
        assert 20 < len(cut) < len(LONG)
        assert caught[0].filename == __file__


def test_a_warning_shows_the_beginning_of_what_is_cut(turbo: ZImagePipeline, small: Options) -> None:
    with pytest.warns(ZImageWarning) as caught:
        turbo.stream(GenerationRequest("a fox, " * 500, **small, max_sequence_length=40))
    message = str(caught[0].message)
    assert len(message) < 400
    assert re.search(r"this is cut off: '[^']{200}'\.\.\. \(3\d{3} characters\)$", message)


def test_the_pictures_of_a_cut_prompt_are_those_of_the_kept_tokens(turbo: ZImagePipeline) -> None:
    tokens = turbo.text_encoder.tokenize(LONG, 40)
    assert len(tokens.ids) == 40
    assert tokens.ids == turbo.text_encoder.tokenize(LONG, 512).ids[:40]
    just = turbo.text_encoder.tokenize(LONG, tokens.total)
    assert (len(just.ids), just.cut) == (tokens.total, "")


def test_nothing_that_was_given_is_changed(base: ZImagePipeline, small: Options) -> None:
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(7))
    features = [torch.linspace(-1, 1, 6 * 64).reshape(6, 64), torch.linspace(1, -1, 9 * 64).reshape(9, 64)]
    given: Options = {
        "negative_prompt": ["x", "y"],
        "sigmas": [1.0, 0.5],
        "latents": noise,
        "prompt_embeds": features,
        "callback_on_step_end_tensor_inputs": ["latents"],
    }
    noise_before, features_before = noise.clone(), [one.clone() for one in features]
    numbers = {name: list(given[name]) for name in ("negative_prompt", "sigmas", "callback_on_step_end_tensor_inputs")}
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (digests(base(**small, **given, callback_on_step_end=lambda *_: {})) for _ in range(2))
    assert first == second
    assert torch.equal(noise, noise_before)
    assert [torch.equal(*pair) for pair in zip(features, features_before, strict=True)] == [True, True]
    assert given["prompt_embeds"] is features
    assert {name: given[name] for name in numbers} == numbers
    prompts = ["a", "b"]
    base(prompts, **small)
    assert prompts == ["a", "b"]
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_calls_leave_grad_mode_and_weights_alone(turbo: ZImagePipeline, small: Options) -> None:
    weights = {name: tensor.clone() for name, tensor in turbo.transformer.state_dict().items()}
    with torch.enable_grad():
        latents = turbo("a", **small, output_type="latent").images
        assert torch.is_grad_enabled()
    assert not latents.requires_grad
    assert all(torch.equal(tensor, weights[name]) for name, tensor in turbo.transformer.state_dict().items())


def test_the_process_is_left_as_it_was(turbo_folder: Path, run_python: Any) -> None:
    """No handlers, no levels, no warning filters, no thread count, no dtype; and nothing is said on stderr."""
    code = """
import sys, logging, warnings, random
import torch, diffusers, transformers, diffusers.pipelines.z_image
from transformers.models.qwen3 import modeling_qwen3
def state():
    loggers = [logging.root, *(logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict))]
    ours = [name for name in logging.root.manager.loggerDict if name.startswith("zimage")]
    known = {one.name: (one.level, len(one.handlers)) for one in loggers if one.handlers or one.level}
    return (known, ours, list(warnings.filters), torch.get_num_threads(), torch.get_default_dtype(), random.getstate(),
        torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled(), sys.excepthook)
before = state()
from zimage import ZImagePipeline
pipe = ZImagePipeline.from_pretrained(sys.argv[1], dtype="float32", device="cpu")
pipe("a", 64, 64, 1, any_size=True, progress=False)
after = state()
print([(x, y) for x, y in zip(before, after) if x != y])
"""
    assert run_python(code, turbo_folder) == "[]\n"


def test_a_process_without_a_console_draws_without_a_bar(
    own_turbo: ZImagePipeline, small: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As services and windowed programs are: they have no stderr at all."""
    own_turbo.set_progress_bar_config()
    monkeypatch.setattr("sys.stderr", None)
    assert own_turbo("a", **small, progress=True).images
    assert list(own_turbo.generate_many([GenerationRequest("a", **small)]))


def test_the_progress_bar_counts_the_steps_of_all_images(
    own_turbo: ZImagePipeline, small: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    own_turbo.set_progress_bar_config(desc="drawing", ascii=True)
    own_turbo(["a", "b"], **small, num_images_per_prompt=2)
    assert "8/8" in capsys.readouterr().err
    own_turbo("a", **small, progress=False)
    own_turbo.set_progress_bar_config(disable=True)
    own_turbo("a", **small)
    assert capsys.readouterr().err == ""
