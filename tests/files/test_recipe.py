import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zimage.editing import SourceImage
from zimage.errors import RequestError
from zimage.files.parameters import parameters_text
from zimage.files.recipe import LIMITS, MAX_CHARACTERS, Recipe, differences, pixel_digest
from zimage.hires import Hires
from zimage.request import GenerationRequest, ResolvedRequest
from zimage.rules import Limits
from zimage.variants import BASE, TURBO, VARIANTS

MODEL = {"source": "Tongyi-MAI/Z-Image", "revision": "abc", "variant": "base", "fingerprint": "f1"}
RUNTIME = {"zimage": "0.1.0", "torch": "2.13.0", "dtype": "float32", "device": "cpu"}
PIXELS = "0123456789abcdef" * 4
IMAGE, MASK = SourceImage(600, 480, "a" * 64, pixels=[1]), SourceImage(600, 480, "b" * 64, pixels=[2])
EDITING = {"image", "mask_image", "strength", "keep_steps", "padding"}
"""What recipes of pictures from an image have besides."""
STEERING = {"control_image", "controlnet_conditioning_scale"}
NET = {"source": "alibaba-pai/Z-Image-Turbo-Fun-Controlnet-Union", "digest": "f" * 64}


def make(**asked: Any) -> Recipe:
    request = GenerationRequest(**{"prompt": "ein Fuchs, 狐狸", "seed": 7, **asked}).resolve(BASE)
    return Recipe(request, MODEL, RUNTIME, PIXELS)


def altered(part: str, **values: Any) -> str:
    """The JSON of a valid recipe with some entries of a part replaced; `...` removes one."""
    document = json.loads(make().to_json())
    target = document[part] if part else document
    target.update(values)
    for name, value in values.items():
        if value is ...:
            del target[name]
    return json.dumps(document)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"prompt": "", "guidance_scale": 0},
        {"prompt": 'two\nlines "quoted" \\ \x00 🦊', "negative_prompt": "unscharf, 模糊"},
        {"sigmas": [1.0, 0.7, 0.1 + 0.2], "sampler": "heun", "cfg_normalization": True, "cfg_truncation": 0.3},
        {"height": 512, "width": 2048, "seed": 2**32 - 1, "max_sequence_length": 1504},
        {"height": 16, "width": 32, "any_size": True},
        {"cache": "balanced"},
        {"diversity": 0.75},
    ],
)
def test_json_gives_the_same_recipe_back(asked: dict[str, Any]) -> None:
    recipe = make(**asked)
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.to_json() == recipe.to_json()
    assert again.replayable
    assert isinstance(again.request.sigmas, tuple)


def test_a_recipe_of_a_model_that_takes_more_is_read_back() -> None:
    limits = Limits(max_side=32768, max_sequence_length=4064)
    asked = GenerationRequest("a fox", seed=7, height=10000, width=16, max_sequence_length=2000, hires=2, any_size=True)
    recipe = Recipe(asked.resolve(BASE, limits=limits), MODEL, RUNTIME, PIXELS)
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"image": IMAGE}, {"image", "strength"}),
        ({"image": IMAGE, "mask_image": MASK}, {"image", "mask_image"}),
        ({"image": IMAGE, "strength": 0.3, "keep_steps": True}, {"image", "strength", "keep_steps"}),
        ({"image": IMAGE, "padding": (64, 0, 8, 16)}, {"image", "padding"}),
    ],
)
def test_a_recipe_knows_images_by_their_digest(asked: dict[str, Any], names: set[str]) -> None:
    recipe = make(**asked)
    assert recipe.request.image == IMAGE
    assert recipe.request.image is not None
    assert recipe.request.image.pixels is None
    document = json.loads(recipe.to_json())["request"]
    assert set(document) & EDITING == names
    assert document["image"] == {"width": 600, "height": 480, "sha256": "a" * 64}
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.to_json() == recipe.to_json()
    assert not again.replayable
    given = again.with_images(IMAGE, asked.get("mask_image"))
    assert given == recipe.request
    assert given.image is IMAGE
    assert given.mask_image is asked.get("mask_image")


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ((None, MASK), r"made from image \(600x480\), of which its recipe has only a digest; pass image"),
        ((IMAGE, None), "made from mask_image .* pass mask_image"),
        ((MASK, MASK), "this image is not the one .* another digest, bbbbbbbbbbbb... and not aaaaaaaaaaaa..."),
        ((replace(IMAGE, width=601), MASK), "this image is not the one"),
    ],
)
def test_other_images_are_refused(images: tuple[Any, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        make(image=IMAGE, mask_image=MASK).with_images(*images)


def steered(**asked: Any) -> Recipe:
    request = GenerationRequest("a fox", seed=7, **{"control_image": IMAGE, **asked}).resolve(BASE)
    return Recipe(request, MODEL, RUNTIME, PIXELS, controlnet=NET)


@pytest.mark.parametrize("asked", [{}, {"controlnet_conditioning_scale": 0}, {"image": MASK, "strength": 0.5}])
def test_a_recipe_knows_what_steered_it(asked: dict[str, Any]) -> None:
    recipe = steered(**asked)
    document = json.loads(recipe.to_json())
    assert document["controlnet"] == NET
    assert document["request"]["control_image"]["sha256"] == IMAGE.digest
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert not again.replayable
    given = again.with_images(image=asked.get("image"), control_image=IMAGE)
    assert given.control_image is IMAGE
    assert given.controlnet_conditioning_scale == asked.get("controlnet_conditioning_scale", 0.75)
    with pytest.raises(RequestError, match="of which its recipe has only a digest; pass control_image"):
        again.with_images(image=asked.get("image"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"controlnet": {}}, "controlnet lacks: source, digest"),
        ({"controlnet": {**NET, "more": "x"}}, "controlnet has unknown entries: more"),
        ({"controlnet": {**NET, "digest": 3}}, "controlnet must hold texts"),
        ({"controlnet": [1]}, "controlnet must be an object"),
        ({"request": {"control_image": None}}, "control_image is of the wrong type"),
        ({"request": {"controlnet_conditioning_scale": 9}}, "must be a number from 0 to 2"),
    ],
)
def test_a_recipe_that_contradicts_what_steered_it_is_refused(change: dict[str, Any], said: str) -> None:
    document = json.loads(steered().to_json())
    for part, value in change.items():
        document[part] = {**document[part], **value} if part == "request" else value
    with pytest.raises(RequestError, match=said):
        Recipe.from_json(json.dumps(document))
    with pytest.raises(RequestError, match="controlnet has unknown entries: source, digest"):
        Recipe(make().request, MODEL, RUNTIME, PIXELS, controlnet=NET)


def test_an_image_too_many_is_refused() -> None:
    with pytest.raises(RequestError, match="made without image; leave it out"):
        make().with_images(IMAGE)


def test_json_says_what_it_is() -> None:
    document = json.loads(make().to_json())
    assert list(document) == ["format", "request", "given", "model", "runtime", "pixels"]
    assert document["format"] == 1
    assert document["request"]["prompt"] == "ein Fuchs, 狐狸"
    assert document["request"]["num_inference_steps"] == 50
    assert set(document["request"]) == set(ResolvedRequest.__dataclass_fields__) - {
        "tensors",
        "cache",
        "adapters",
        "diversity",
        "hires",
        *EDITING,
        *STEERING,
    }
    assert "狐狸" in make().to_json()


def test_a_path_that_is_not_unicode_survives() -> None:
    recipe = Recipe(make().request, {**MODEL, "source": "/models/\udcff"}, RUNTIME, PIXELS)
    assert recipe.to_json().isascii()
    assert Recipe.from_json(recipe.to_json()).model["source"] == "/models/\udcff"


def test_tensors_are_named_not_kept() -> None:
    tensor = SimpleNamespace()
    request = ResolvedRequest(**{**make().request.__dict__, "tensors": {"latents": tensor, "prompt_embeds": tensor}})
    recipe = Recipe(request, MODEL, RUNTIME, PIXELS)
    assert recipe.given == ("latents", "prompt_embeds")
    assert recipe.request.tensors == {}
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert not again.replayable


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "JSON object"),
        ("null", "JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": 1, "a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("x" * (MAX_CHARACTERS + 1), "characters long"),
        ("{}", "no format number"),
        (altered("", format=True), "no format number"),
        (altered("", format="1"), "no format number"),
        (altered("", format=2), "update it"),
        (altered("", extra=1), "unknown entries: extra"),
        (altered("", pixels=...), "lacks: pixels"),
        (altered("", pixels="ab"), "64 hexadecimal digits"),
        (altered("", pixels=["0"] * 64), "64 hexadecimal digits"),
        (altered("request", image="a"), "image is of the wrong type"),
        (altered("request", image={"width": 8, "height": 8}), "image lacks: sha256"),
        (altered("request", image={"width": 8, "height": 8.5, "sha256": "a" * 64}), "height of image must be a whole"),
        (
            altered("request", image={"width": 8, "height": 2**40, "sha256": "a" * 64}),
            "height of image must be a whole",
        ),
        (altered("request", image={"width": 8, "height": 8, "sha256": "A" * 64}), "sha256 of image must be 64 hexa"),
        (altered("request", mask_image={"width": 8, "height": 8, "sha256": "a" * 64}), "none is given; pass image"),
        (altered("request", strength=0.5), "none is given; pass image"),
        (altered("request", keep_steps=1), "keep_steps is of the wrong type"),
        (altered("request", padding=[1, 2]), "none is given; pass image"),
        (altered("", given={"latents": 1}), "given must list"),
        (altered("", given=["sigmas"]), "given must list"),
        (altered("", given=[["latents"]]), "given must list"),
        (altered("", request=[1]), "request must be an object"),
        (altered("", model="m"), "model must be an object"),
        (altered("", runtime={"a": 1}), "must hold texts"),
        (altered("", runtime={str(n): "" for n in range(65)}), "at most 64"),
        (altered("model", source="x" * 4097), "at most 4096"),
        (altered("model", source=None), "must hold texts"),
        (altered("model", extra="x"), "unknown entries: extra"),
        (altered("model", revision=...), "lacks: revision"),
        (altered("model", variant="turbo"), "recipe is for base"),
        (altered("request", tensors={}), "unknown entries: tensors"),
        (altered("request", any_size=True), "unknown entries: any_size"),
        (altered("request", **{"\x1b[31m": 1}), r"unknown entries: '\\x1b\[31m'"),
        (altered("request", seed=...), "lacks: seed"),
        (altered("request", seed=None), "seed is of the wrong type"),
        (altered("request", height=None), "height is of the wrong type"),
        (altered("request", num_inference_steps=8.0), "num_inference_steps is of the wrong type"),
        (altered("request", num_inference_steps=10**9), "from 1 to 1000"),
        (altered("request", seed=-1), "seed must be"),
        (altered("request", seed=2**32), "seed must be"),
        (altered("request", height=True), "height is of the wrong type"),
        (altered("request", width=2**20 + 16), "width must be"),
        (altered("request", width=1000), "multiple of 16"),
        (altered("request", max_sequence_length=2**16 + 1), "max_sequence_length must be"),
        (altered("request", hires={"scale": 9, "strength": 0.5, "upscale": "pixels"}), "its scale must be"),
        (altered("request", guidance_scale=float("nan")), "NaN is not JSON"),
        (altered("request").replace('"guidance_scale": 4.0', '"guidance_scale": 1e999'), "guidance_scale must be"),
        (altered("request", guidance_scale=10**400), "guidance_scale must be"),
        (altered("request", guidance_scale=False), "guidance_scale is of the wrong type"),
        (altered("request", cfg_truncation=1.5), "cfg_truncation must be"),
        (altered("request", shift=0), "shift must be"),
        (altered("request", shift=10**400), "shift must be"),
        (altered("request", sigmas=[0.5, "0.1"]), "sigmas must be"),
        (altered("request", sigmas=[0.5, 0.1]), "num_inference_steps is 50"),
        (altered("request", sampler="ddim"), "sampler must be one of"),
        (altered("request", sampler="x" * 10_000), "sampler must be one of"),
        (altered("request", variant="flux"), "variant must be one of"),
        (altered("request", variant="turbo"), "must be 0 for Z-Image-Turbo"),
        (altered("request", prompt=1), "prompt is of the wrong type"),
        (altered("request", prompt="\ud800"), "not Unicode"),
        (altered("request", guidance_scale=0, negative_prompt="x"), "negative prompt has no effect"),
    ],
)
def test_what_is_not_a_recipe_is_a_request_error(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        Recipe.from_json(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [None, 1, b"{}", ["{}"]])
def test_what_is_not_a_text_is_a_request_error(value: Any) -> None:
    with pytest.raises(RequestError, match="must be a text"):
        Recipe.from_json(value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_change_gives_a_recipe_or_a_request_error(data: st.DataObject) -> None:
    document = json.loads(make().to_json())
    part = data.draw(st.sampled_from([document, document["request"], document["model"], document["runtime"]]))
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON_VALUES)
    try:
        recipe = Recipe.from_json(json.dumps(document))
    except RequestError:
        return
    assert Recipe.from_json(recipe.to_json()) == recipe
    request = recipe.request
    assert request.resolve(VARIANTS[request.variant], shift=request.shift, limits=LIMITS) == request


@pytest.mark.parametrize("runtime", [{"threads": 4}, {1: "x"}, ["torch"]])
def test_a_recipe_that_could_not_be_read_back_is_refused_when_made(runtime: Any) -> None:
    with pytest.raises(RequestError, match="runtime must"):
        Recipe(make().request, MODEL, runtime, PIXELS)


def test_pixel_digest_is_of_size_and_rgb() -> None:
    image = Image.new("RGB", (4, 2), (1, 2, 3))
    assert pixel_digest(image) == hashlib.sha256(b"4x2 RGB\n" + bytes((1, 2, 3)) * 8).hexdigest()
    assert pixel_digest(image) == pixel_digest(image.convert("RGBA"))
    assert pixel_digest(image) != pixel_digest(Image.new("RGB", (2, 4), (1, 2, 3)))
    other = image.copy()
    other.putpixel((3, 1), (1, 2, 4))
    assert pixel_digest(image) != pixel_digest(other)


@pytest.mark.parametrize(
    ("model", "runtime", "expected"),
    [
        ({}, {}, []),
        ({}, {"torch": "2.12.0"}, ["torch was 2.13.0, here it is 2.12.0"]),
        ({}, {"device": ""}, ["device was cpu, here it is unknown"]),
        ({}, {"cudnn": "9"}, []),
        ({"revision": ""}, {}, []),
        ({"source": "/here", "revision": "def"}, {}, []),
        ({"fingerprint": "f2"}, {}, ["model fingerprint was f1, here it is f2"]),
        ({"fingerprint": "", "source": "/here"}, {}, ["model source was Tongyi-MAI/Z-Image, here it is /here"]),
        ({"variant": "turbo"}, {}, ["model variant was base, here it is turbo"]),
        ({}, {"dtype": "\x1b[31m"}, ["dtype was float32, here it is '\\x1b[31m'"]),
    ],
)
def test_differences(model: Mapping[str, str], runtime: Mapping[str, str], expected: list[str]) -> None:
    assert differences(make(), {**MODEL, **model}, {**RUNTIME, **runtime}) == expected


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_files_are_compared_by_their_fingerprint(part: str) -> None:
    recipe = replace(make(), model={**MODEL, part: "~/a.gguf"})
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json())["model"][part] == "~/a.gguf"
    moved = {**MODEL, part: "/b.gguf"}
    assert differences(recipe, moved, RUNTIME) == []
    assert differences(recipe, {**moved, "fingerprint": "f2"}, RUNTIME) == [
        "model fingerprint was f1, here it is f2", f"model {part} was ~/a.gguf, here it is /b.gguf",
    ]  # fmt: skip


def test_parameters_text_is_what_other_tools_read() -> None:
    recipe = make(prompt="a fox", negative_prompt="blurry", width=768, sampler="dpmpp_2m", guidance_scale=3.5)
    assert parameters_text(recipe) == (
        "a fox\nNegative prompt: blurry\n"
        "Steps: 50, Sampler: DPM++ 2M, CFG scale: 4.5, Seed: 7, Size: 768x1024, Model: Z-Image, Version: zimage 0.1.0"
    )


def test_parameters_text_without_guidance() -> None:
    request = GenerationRequest("a fox", seed=0).resolve(TURBO)
    model = {"source": "", "revision": "", "variant": "", "fingerprint": ""}
    assert parameters_text(Recipe(request, model, {}, PIXELS)) == (
        "a fox\nSteps: 8, Sampler: Euler, CFG scale: 1, Seed: 0, Size: 1024x1024, Model: Z-Image-Turbo, Version: zimage"
    )


def test_parameters_text_keeps_prompts_out_of_its_own_lines() -> None:
    recipe = make(prompt="a\r\nfox\x00\nSteps: 1, Seed: 1\u2028👨‍👩‍👧", negative_prompt="b\nc")
    prompt, negative, last = parameters_text(recipe).split("\n")
    assert prompt == "a fox Steps: 1, Seed: 1 👨‍👩‍👧"
    assert negative == "Negative prompt: b c"
    assert last.startswith("Steps: 50, ")


def test_parameters_text_names_no_folder_and_quotes_separators() -> None:
    recipe = Recipe(make().request, {**MODEL, "source": "/home/someone/my, model"}, RUNTIME, PIXELS)
    assert 'Model: "my, model", ' in parameters_text(recipe)
    assert "someone" not in parameters_text(recipe)


def test_a_second_pass_is_kept_and_read() -> None:
    recipe = make(hires=Hires(1.5, 0.3, "latents"))
    assert json.loads(recipe.to_json())["request"]["hires"] == {"scale": 1.5, "strength": 0.3, "upscale": "latents"}
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.request.hires == Hires(1.5, 0.3, "latents", (1536, 1536))


@pytest.mark.parametrize(
    "hires",
    [
        2,
        "2",
        {"scale": 2},
        {"scale": 2, "strength": 0.4, "upscale": "pixels", "size": [32, 32]},
        {"scale": "2", "strength": 0.4, "upscale": "pixels"},
        {"scale": 1e9, "strength": 0.4, "upscale": "pixels"},
        {"scale": 2, "strength": {}, "upscale": "pixels"},
        {"scale": 2, "strength": 0.4, "upscale": ["pixels"]},
        {"scale": 2, "strength": 0.0, "upscale": "pixels"},
    ],
)
def test_a_second_pass_that_cannot_be(hires: Any) -> None:
    with pytest.raises(RequestError, match=r"hires|the recipe is not valid"):
        Recipe.from_json(altered("request", hires=hires))
