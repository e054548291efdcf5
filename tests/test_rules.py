"""Whatever cannot work is refused with a remedy, as a `RequestError`, before any weight computes or any noise is drawn.

`REFUSED` lists the kinds of wrong arguments of a call; what each option may be is in the tests that follow.
"""

from __future__ import annotations

import math
import re
import threading
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from zimage import GenerationRequest, RequestError, ZImageError, ZImagePipeline
from zimage.components import limits_of
from zimage.editing import SourceImage
from zimage.request import expand_requests
from zimage.rules import MAX_AREA, MAX_SEED, MIN_AREA, Limits, number, shown
from zimage.variants import BASE, TURBO, VARIANTS

from .conftest import CountForwards

NAN, INF = math.nan, math.inf
EMBEDS = torch.ones(5, 64)
LATENTS = torch.zeros(1, 16, 128, 128)
"""Caption features and latents that fit the tiny checkpoints at their default size."""


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_one(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A copy of which one element is `value`."""
    copy = tensor.clone()
    copy.view(-1)[3] = value
    return copy


STEPS = "num_inference_steps must be a whole number"
GUIDANCE = "guidance_scale must be a number from 0 up"
SIGMA = "each of sigmas must be a number from 0 to 1"
SEED = "seed must be a whole number"
LATENT_SHAPE = r"latents must be a tensor \(1, channels, height/8, width/8\)"
EMBEDS_SHAPE = r"prompt_embeds must be a tensor \(tokens, 64\)"

# model, arguments of the call (the prompt is "a fox" unless given), what the message says
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "height-not-a-multiple": ("turbo", {"height": 1000}, "height must be a multiple of 16, got 1000; try 992 or 1008"),
    "width-not-a-multiple": ("turbo", {"width": 1023}, "width must be a multiple of 16, got 1023; try 1008 or 1024"),
    "side-below-a-multiple": ("turbo", {"height": 8}, "height must be a multiple of 16, got 8; try 16"),
    "side-zero": ("turbo", {"height": 0}, "height must be a whole number from 1"),
    "side-negative": ("turbo", {"width": -1024}, "width must be a whole number from 1"),
    "side-fraction": ("turbo", {"height": 1024.5}, "height must be a whole number"),
    "side-text": ("turbo", {"height": "1024"}, "height must be a whole number"),
    "side-too-long": ("turbo", {"width": 8208, "any_size": True}, "width must be a whole number from 1 to 8192"),
    "area-too-small": ("turbo", {"height": 240, "width": 256}, "0.06 megapixels.*any_size=True"),
    "area-too-large": ("turbo", {"height": 2064, "width": 2048}, "4.23 megapixels.*any_size=True"),
    "any-size-text": ("turbo", {"any_size": "no"}, "any_size must be True or False, got str 'no'"),
    "steps-zero": ("turbo", {"num_inference_steps": 0}, f"{STEPS} from 1 to 1000, got 0"),
    "steps-negative": ("turbo", {"num_inference_steps": -8}, STEPS),
    "steps-fraction": ("turbo", {"num_inference_steps": 8.5}, STEPS),
    "steps-bool": ("turbo", {"num_inference_steps": True}, STEPS),
    "steps-too-many": ("turbo", {"num_inference_steps": 1001}, f"{STEPS} from 1 to 1000"),
    "guidance-nan": ("base", {"guidance_scale": NAN}, GUIDANCE),
    "guidance-infinite": ("base", {"guidance_scale": INF}, GUIDANCE),
    "guidance-negative": ("base", {"guidance_scale": -1}, GUIDANCE),
    "guidance-text": ("base", {"guidance_scale": "4"}, GUIDANCE),
    "guidance-bool": ("base", {"guidance_scale": True}, GUIDANCE),
    "guidance-on-turbo": ("turbo", {"guidance_scale": 4.0}, "must be 0 for Z-Image-Turbo, got 4.*use the base model"),
    "negative-prompt-on-turbo": ("turbo", {"negative_prompt": "blurry"}, "negative prompt has no effect.*leave it out"),
    "negative-prompt-unguided": ("base", {"negative_prompt": "blurry", "guidance_scale": 0}, "raise guidance_scale"),
    "negative-embeds-on-turbo": ("turbo", {"negative_prompt_embeds": EMBEDS}, "a negative prompt has no effect"),
    "normalization-on-turbo": ("turbo", {"cfg_normalization": True}, "cfg_normalization has no effect"),
    "normalization-unguided": ("base", {"cfg_normalization": 0.5, "guidance_scale": 0}, "raise guidance_scale above 0"),
    "normalization-negative": ("base", {"cfg_normalization": -1.0}, "cfg_normalization must be a number from 0 up"),
    "truncation-on-turbo": ("turbo", {"cfg_truncation": 0.5}, "cfg_truncation has no effect"),
    "truncation-above-one": ("base", {"cfg_truncation": 1.5}, "cfg_truncation must be a number from 0 to 1"),
    "diversity-negative": ("turbo", {"diversity": -0.1}, "diversity must be a number from 0 to 4"),
    "diversity-too-much": ("turbo", {"diversity": 4.5}, "diversity must be a number from 0 to 4"),
    "diversity-nan": ("base", {"diversity": NAN}, "diversity must be a number from 0 to 4"),
    "diversity-text": ("base", {"diversity": "much"}, "diversity must be a number from 0 to 4"),
    "truncation-negative": ("base", {"cfg_truncation": -0.1}, "cfg_truncation must be a number from 0 to 1"),
    "seed-negative": ("turbo", {"seed": -1}, SEED),
    "seed-too-long": ("turbo", {"seed": 10**5000}, f"{SEED} from 0 to {MAX_SEED}, got one of more than 30 digits"),
    "seed-too-large": ("turbo", {"seed": 2**32}, f"{SEED} from 0 to {MAX_SEED}, got {2**32}"),
    "seed-fraction": ("turbo", {"seed": 7.0}, SEED),
    "seed-bool": ("turbo", {"seed": True}, SEED),
    "seed-of-a-later-image-too-large": (
        "turbo",
        {"seed": MAX_SEED - 1, "num_images_per_prompt": 3},
        f"too few seeds for 3 images.*start at {MAX_SEED - 2} or below",
    ),
    "seed-and-generator": ("turbo", {"seed": 1, "generator": generator()}, "seed and generator are both given.*drop"),
    "seed-and-latents": ("turbo", {"seed": 1, "latents": LATENTS}, "seed and latents are both given.*drop one"),
    "seed-and-latents-without-diversity": ("turbo", {"seed": 1, "latents": LATENTS, "diversity": 0}, "drop one"),
    "seed-of-a-second-pass": ("turbo", {"seed": -1, "latents": LATENTS, "hires": 2}, SEED),
    "latents-and-generator": ("turbo", {"latents": LATENTS, "generator": generator()}, "latents and generator are"),
    "generator-is-a-seed": ("turbo", {"generator": 7}, "generator must be a torch.Generator or a list of them"),
    "images-zero": ("turbo", {"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number"),
    "images-fraction": ("turbo", {"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a whole number"),
    "unequal-negative-prompts": (
        "base",
        {"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]},
        "negative_prompt has 2 entries for 3 prompts; pass one, or one for each",
    ),
    "unequal-seeds": ("turbo", {"prompt": ["a", "b"], "seed": [1, 2, 3]}, "seed has 3 entries for 2 images"),
    "unequal-generators": (
        "turbo",
        {"prompt": ["a", "b"], "generator": [generator(), generator(), generator()]},
        "generator has 3 entries for 2 images",
    ),
    "unequal-embeds": (
        "base",
        {"prompt": None, "prompt_embeds": [EMBEDS] * 3, "negative_prompt_embeds": [EMBEDS] * 2},
        "negative_prompt_embeds has 2 entries for 3 prompts",
    ),
    "prompts-none-in-list": ("turbo", {"prompt": []}, "prompt is an empty list; pass at least one entry"),
    "embeds-none-in-list": ("turbo", {"prompt": None, "prompt_embeds": []}, "prompt_embeds is an empty list"),
    "prompt-none": ("turbo", {"prompt": None}, "nothing to draw: pass a prompt"),
    "prompt-number": ("turbo", {"prompt": 7}, "prompt must be a text or a list of texts, got int 7"),
    "prompt-bytes": ("turbo", {"prompt": b"a fox"}, "prompt must be a text"),
    "prompt-number-in-list": ("turbo", {"prompt": ["a fox", 7]}, "prompt must be a text, got int 7"),
    "prompt-half-a-character": ("turbo", {"prompt": "a \ud800"}, "prompt has characters that are not Unicode"),
    "prompt-tensor": ("turbo", {"prompt": EMBEDS}, "prompt must be a text, got Tensor of shape"),
    "negative-prompt-number": ("base", {"negative_prompt": 7}, "negative_prompt must be a text or a list of texts"),
    "negative-prompt-tensor": ("base", {"negative_prompt": EMBEDS}, "negative_prompt must be a text, got Tensor"),
    "latents-of-another-size": ("turbo", {"latents": LATENTS[..., :64]}, r"\(16, 128, 128\) for 1024x1024"),
    "latents-without-batch": ("turbo", {"latents": LATENTS[0]}, LATENT_SHAPE),
    "latents-for-more-images": ("turbo", {"latents": torch.cat([LATENTS, LATENTS])}, LATENT_SHAPE),
    "latents-of-integers": ("turbo", {"latents": LATENTS.int()}, "latents must be a floating-point torch tensor"),
    "latents-of-numpy": ("turbo", {"latents": LATENTS.numpy()}, LATENT_SHAPE),
    "latents-nan": ("turbo", {"latents": with_one(LATENTS, NAN)}, "latents has values that are not finite"),
    "embeds-of-another-model": ("turbo", {"prompt": None, "prompt_embeds": torch.ones(5, 63)}, EMBEDS_SHAPE),
    "embeds-in-a-batch": ("turbo", {"prompt": None, "prompt_embeds": EMBEDS[None]}, EMBEDS_SHAPE),
    "embeds-without-tokens": ("turbo", {"prompt": None, "prompt_embeds": EMBEDS[:0]}, "must have 1 to 1504 tokens"),
    "embeds-infinite": ("turbo", {"prompt": None, "prompt_embeds": with_one(EMBEDS, INF)}, "prompt_embeds has values"),
    "prompt-and-embeds": ("turbo", {"prompt_embeds": EMBEDS}, "prompt and prompt_embeds are both given; leave one out"),
    "embeds-sparse": ("turbo", {"prompt": None, "prompt_embeds": EMBEDS.to_sparse()}, "prompt_embeds must be a dense"),
    "latents-meta": ("turbo", {"latents": torch.zeros(1, 16, 128, 128, device="meta")}, "latents must be a dense"),
    "sigmas-ascending": ("turbo", {"sigmas": [0.5, 0.75, 1.0]}, "sigmas must descend, got 0.75 after 0.5; sort them"),
    "sigmas-repeated": ("turbo", {"sigmas": [1.0, 0.5, 0.5]}, "sigmas must descend.*without repetition"),
    "sigmas-above-one": ("turbo", {"sigmas": [1.5, 0.5]}, SIGMA),
    "sigmas-nan": ("turbo", {"sigmas": [1.0, NAN]}, SIGMA),
    "sigmas-ending-in-zero": ("turbo", {"sigmas": [1.0, 0.5, 0.0]}, "sigmas must not end in 0.*leave it out"),
    "sigmas-one-in-float32": ("turbo", {"sigmas": [0.9, 0.5, 0.49999999999]}, "0.75 and 0.75, after the shift, are"),
    "sigmas-one-by-the-shift": ("base", {"sigmas": [1.0, 0.999997]}, "1 and 0.999999.*more than a millionth apart"),
    "sigmas-as-good-as-zero": ("turbo", {"sigmas": [0.9, 0.5, 1e-46]}, "last noise level is 3e-46.*keep sigmas.*above"),
    "sigmas-empty": ("turbo", {"sigmas": []}, "sigmas must have 1 to 1000 entries, got 0"),
    "sigmas-number": ("turbo", {"sigmas": 0.5}, "sigmas must be a list of numbers, got float 0.5"),
    "sigmas-scalar-tensor": ("turbo", {"sigmas": torch.tensor(0.5)}, "sigmas must be a list of numbers, got Tensor"),
    "sigmas-and-steps": ("turbo", {"sigmas": [1.0, 0.5], "num_inference_steps": 8}, "sigmas has 2 entries, one per"),
    "sampler-unknown": ("turbo", {"sampler": "ddim"}, "sampler must be one of euler, heun, dpmpp_2m, got 'ddim'"),
    "sampler-array": ("turbo", {"sampler": np.array(["euler", "heun"])}, "sampler must be one of euler, heun"),
    "prompt-tokens-zero": ("turbo", {"max_sequence_length": 0}, "max_sequence_length must be a whole number from 1 to"),
    "prompt-tokens-too-many": ("turbo", {"max_sequence_length": 1505}, "max_sequence_length.*from 1 to 1504, got 1505"),
    "output-type-unknown": ("turbo", {"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent"),
    "output-type-array": ("turbo", {"output_type": np.array(["pil", "np"])}, "output_type must be one of pil, np"),
    "cancel-bool": ("turbo", {"cancel": True}, r"cancel must be an event, such as threading.Event.* bool True"),
    "cancel-callable": ("turbo", {"cancel": lambda: False}, "cancel must be an event.* got function"),
    "cancel-class": ("turbo", {"cancel": threading.Event}, "cancel must be an event.* got type"),
    "callback-not-callable": ("turbo", {"callback_on_step_end": 5}, "callback_on_step_end must be callable, got int"),
    "callback-names-unknown": (
        "turbo",
        {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["latents", "noise"]},
        "a list out of latents, prompt_embeds, negative_prompt_embeds",
    ),
    "callback-names-text": (
        "turbo",
        {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": "latents"},
        "callback_on_step_end_tensor_inputs must be a list out of",
    ),
    "callback-names-none": (
        "turbo",
        {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": None},
        "callback_on_step_end_tensor_inputs must be a list out of",
    ),
    "adapter-scale-without-adapter": ("turbo", {"joint_attention_kwargs": {"scale": 0.5}}, "leave it out"),
    "request-and-options": ("turbo", {"prompt": GenerationRequest("a fox"), "seed": 7}, "put seed into it instead"),
    "request-and-generator": ("turbo", {"prompt": GenerationRequest("a fox"), "generator": generator()}, "put gen"),
    "requests-and-texts": ("turbo", {"prompt": [GenerationRequest("a fox"), "a cat"]}, "prompt must be a text"),
    "requests-of-two-sizes-as-one-array": (
        "turbo",
        {"prompt": [GenerationRequest("a fox"), GenerationRequest("a fox", width=768)], "output_type": "np"},
        "output_type='np' needs images of one size; use 'pil'",
    ),
    "request-for-the-other-model": (
        "turbo",
        {"prompt": GenerationRequest("a fox").resolve(BASE)},
        "resolved for base, the pipeline holds turbo; make a GenerationRequest",
    ),
}  # fmt: skip
OF_ONE_PICTURE = [
    kind
    for kind, (_, options, _) in REFUSED.items()
    if kind != "latents-without-batch" and set(options) <= {field.name for field in fields(GenerationRequest)}
]
"""The kinds that are about one picture, so that a `GenerationRequest` has them too."""


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_call_is_refused_before_anything_computes(
    kind: str, request: pytest.FixtureRequest, count_forwards: CountForwards
) -> None:
    model, options, says = REFUSED[kind]
    pipe = request.getfixturevalue(model)
    global_state = torch.random.get_rng_state()
    with count_forwards(pipe) as forwards, pytest.raises(RequestError, match=says) as raised:
        pipe(**{"prompt": "a fox", **options})
    assert forwards["any"] == 0
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, ZImageError)
    assert torch.equal(torch.random.get_rng_state(), global_state)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_call_draws_nothing_from_its_generator(kind: str, request: pytest.FixtureRequest) -> None:
    model, options, _ = REFUSED[kind]
    given = options.get("generator", generator(5))
    generators = [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, torch.Generator)]
    before = [one.get_state() for one in generators]
    with pytest.raises(RequestError):
        request.getfixturevalue(model)(**{"prompt": "a fox", **options, "generator": given})
    assert all(torch.equal(one.get_state(), state) for one, state in zip(generators, before, strict=True))


@pytest.mark.parametrize("kind", OF_ONE_PICTURE)
def test_what_a_call_refuses_a_request_refuses(kind: str, request: pytest.FixtureRequest) -> None:
    model, options, _ = REFUSED[kind]
    with pytest.raises(RequestError):
        request.getfixturevalue(model).resolve(GenerationRequest(**{"prompt": "a fox", **options}))


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "", 3.5, ["cpu"], "meta", torch.device("meta"), "hpu", 10**40])
def test_a_device_that_is_not_there(turbo: ZImagePipeline, turbo_folder: Path, device: Any) -> None:
    with pytest.raises(RequestError, match=r"device .* cannot be used here .*; leave it out, or pass 'cpu'"):
        ZImagePipeline.from_pretrained(turbo_folder, device=device)
    with pytest.raises(RequestError, match="cannot be used here"):
        turbo.to(device)
    assert turbo.device.type == turbo.autoencoder.vae.device.type == "cpu"


@pytest.mark.parametrize("dtype", ["float8", "bf16", torch.int8, torch.float64, 16])
def test_a_precision_that_there_is_not(turbo: ZImagePipeline, turbo_folder: Path, dtype: Any) -> None:
    for name in ("dtype", "torch_dtype"):
        with pytest.raises(RequestError, match="dtype must be 'auto', 'float32', 'bfloat16', 'float16' or their torch"):
            ZImagePipeline.from_pretrained(turbo_folder, **{name: dtype})
    with pytest.raises(RequestError, match="dtype must be 'auto'"):
        turbo.to(dtype=dtype)
    assert turbo.dtype == torch.float32


def test_a_precision_said_twice(turbo_folder: Path) -> None:
    with pytest.raises(RequestError, match=r"dtype and torch_dtype are both given.*leave torch_dtype out"):
        ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", torch_dtype=torch.float32)


@pytest.mark.parametrize(
    ("height", "width", "fits"),
    [(256, 256, True), (240, 256, False), (2048, 2048, True), (2048, 2064, False), (16, 4096, True), (8192, 512, True)],
)
def test_areas_are_bounded_and_any_size_lifts_the_bounds(height: int, width: int, fits: bool) -> None:
    assert (MIN_AREA <= height * width <= MAX_AREA) is fits
    asked = {"height": height, "width": width}
    if fits:
        assert GenerationRequest("x", **asked).resolve(TURBO).height == height
    else:
        with pytest.raises(RequestError, match=re.escape(f"{width}x{height} is")):
            GenerationRequest("x", **asked).resolve(TURBO)
    assert GenerationRequest("x", **asked, any_size=True).resolve(TURBO).width == width


@pytest.mark.parametrize(
    ("native", "default", "least", "most"),
    [(1024, 1024, 256, 2048), (128, 128, 32, 256), (192, 192, 48, 384), (100, 96, 32, 192)],
)
def test_sizes_go_with_the_side_that_a_model_was_trained_at(native: int, default: int, least: int, most: int) -> None:
    limits = Limits(native_side=native)

    def resolve(**asked: int) -> Any:
        return GenerationRequest("x", **asked).resolve(TURBO, limits=limits)

    assert (resolve().height, resolve().width) == (default, default)
    assert resolve(height=least, width=least).height == least
    assert resolve(height=most, width=most).width == most
    for height, width in ((least, least - 16), (most, most + 32)):
        with pytest.raises(
            RequestError, match=rf"{width}x{height} is .*² to .*²\)\. Choose such a size, or pass any_size"
        ):
            resolve(height=height, width=width)


def test_the_native_side_is_read_from_the_vae(turbo: ZImagePipeline) -> None:
    configs = turbo.transformer.config, turbo.autoencoder.vae.config
    assert turbo.limits.native_side == 1024
    for said, side in ((128, 128), (32, 1024), (512, 512)):
        vae = SimpleNamespace(**{**configs[1], "sample_size": said})
        assert limits_of(configs[0], vae).native_side == side


@pytest.mark.parametrize("seed", [0, 7, MAX_SEED, np.int64(7), np.uint32(MAX_SEED), torch.tensor(7)])
def test_seeds_are_whole_numbers_of_32_bits(seed: Any) -> None:
    resolved = GenerationRequest("x", seed=seed).resolve(TURBO).seed
    assert (resolved, type(resolved)) == (int(seed), int)


def test_a_seed_is_drawn_where_none_is_given() -> None:
    seeds = {GenerationRequest("x").resolve(TURBO).seed for _ in range(50)}
    assert len(seeds) > 45
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


@pytest.mark.parametrize("scale", [0, 4, 4.0, np.float64(4), torch.tensor(4.0), 1e-3])
def test_guidance_is_a_plain_number(scale: Any) -> None:
    resolved = GenerationRequest("x", guidance_scale=scale).resolve(BASE).guidance_scale
    assert (resolved, type(resolved)) == (float(scale), float)


@pytest.mark.parametrize(("asked", "meant"), [(True, 1.0), (False, 0.0), (0, 0.0), (2.5, 2.5), (None, 0.0)])
def test_normalization_may_be_a_bool(asked: Any, meant: float) -> None:
    assert GenerationRequest("x", cfg_normalization=asked).resolve(BASE).cfg_normalization == meant


def test_options_that_do_nothing_by_their_value_are_no_mistake() -> None:
    neutral = {"guidance_scale": 0.0, "negative_prompt": "", "cfg_normalization": False, "cfg_truncation": 1.0}
    plain = GenerationRequest("x", seed=1)
    assert GenerationRequest("x", seed=1, **neutral).resolve(TURBO) == plain.resolve(TURBO)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "numpy", "torch"])
def test_sigmas_of_any_kind_give_the_number_of_steps(kind: Any) -> None:
    resolved = GenerationRequest("x", sigmas=kind([1.0, 0.5, 0.25])).resolve(TURBO)
    assert resolved.sigmas == (1.0, 0.5, 0.25)
    assert resolved.num_inference_steps == 3


@pytest.mark.parametrize("array", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_flags_and_lists_of_numbers_may_be_arrays(array: Any) -> None:
    image = SourceImage(width=512, height=512, digest="0" * 64)
    same = {"sampler": "euler", "num_inference_steps": 6, "seed": 1}
    lists: dict[str, Any] = {"padding": [32, 0, 32, 0], "cache": [0, 1, 2, 5], "any_size": True, "keep_steps": True}
    asked = GenerationRequest(
        "x", image=image, strength=0.9, **same, **{name: array(one) for name, one in lists.items()}
    )
    assert asked.resolve(BASE) == GenerationRequest("x", image=image, strength=0.9, **same, **lists).resolve(BASE)
    off = array(False)
    assert GenerationRequest("x", **same, keep_steps=off, any_size=off).resolve(BASE) == GenerationRequest(
        "x", **same
    ).resolve(BASE)
    seeds = [request.seed for request in expand_requests("x", num_images_per_prompt=2, seed=array([1, 5]))]
    assert seeds == [1, 5]
    for name, value in (
        ("any_size", 1),
        ("keep_steps", 1.0),
        ("cache", [0.0, 1.0, 5.0]),
        ("padding", [[1, 2], [3, 4]]),
    ):
        with pytest.raises(RequestError, match=name):
            replace(asked, **{name: array(value)}).resolve(BASE)
    with pytest.raises(RequestError, match="seed must be a whole number"):
        expand_requests("x", num_images_per_prompt=2, seed=array([[1, 2]]))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("length", [1, 512, 1504])
def test_as_many_prompt_tokens_as_there_are_positions(variant: Any, length: int) -> None:
    embeds = torch.zeros(length, 2560)
    asked = GenerationRequest(prompt_embeds=embeds, max_sequence_length=length)
    resolved = asked.resolve(variant)
    assert torch.equal(resolved.tensors["prompt_embeds"], embeds)
    assert resolved.max_sequence_length == length
    with pytest.raises(RequestError, match="must have 1 to 1504 tokens, got 1505"):
        GenerationRequest(prompt_embeds=torch.zeros(1505, 2560)).resolve(variant)


def test_the_limits_are_those_of_the_loaded_model(turbo: ZImagePipeline) -> None:
    assert turbo.limits == Limits(caption_features=64)
    narrow = Limits(max_side=512, max_sequence_length=100, latent_channels=4, size_multiple=32)
    for asked, says in (
        ({"height": 1024}, "height must be a whole number from 1 to 512"),
        ({"max_sequence_length": 101}, "from 1 to 100"),
        ({"width": 336}, "multiple of 32, got 336; try 320 or 352"),
        ({"latents": torch.zeros(16, 64, 64)}, r"latents must be \(4, 64, 64\) for 512x512"),
    ):
        with pytest.raises(RequestError, match=says):
            GenerationRequest("x", **{"height": 512, "width": 512, "max_sequence_length": 100, **asked}).resolve(
                TURBO, limits=narrow
            )


def test_messages_show_values_briefly() -> None:
    assert shown("a" * 100) == f"str '{'a' * 56}..."
    assert shown(torch.zeros(2, 3)) == "Tensor of shape (2, 3) and dtype torch.float32"
    assert shown(np.zeros(2, dtype=np.int8)) == "ndarray of shape (2,) and dtype int8"
    with pytest.raises(RequestError, match=r"^x must be a number from 0 up, got complex 1j$"):
        number("x", 1j, 0.0, INF)
