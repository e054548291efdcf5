"""What can be measured, and what is refused before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from zimage import VARIANTS, RequestError
from zimage.bench.settings import PICTURES, Settings, prompt, texts
from zimage.testing.configs import SIZES


def test_every_size_has_a_picture() -> None:
    assert set(PICTURES) == set(SIZES)
    request = Settings(size="real", variant="base").request(VARIANTS["base"]).resolve(VARIANTS["base"])
    assert (request.height, request.width, request.num_inference_steps, request.guidance_scale) == (1024, 1024, 50, 4.0)
    given = Settings(size="small", height=256, steps=3).request(VARIANTS["turbo"]).resolve(VARIANTS["turbo"])
    assert (given.height, given.width, given.num_inference_steps, given.guidance_scale) == (256, 512, 3, 0.0)


def test_texts_are_new_in_every_round_and_equally_long() -> None:
    prompts = [prompt(number, 20) for number in (0, 7, 123, 99999)]
    assert len(set(prompts)) == 4
    assert {len(one.split()) for one in prompts} == {20}
    assert {len(one) for one in prompts} == {len(prompts[0])}
    assert len(prompt(1, 50).split()) == 50
    for name, number in (("base", 2), ("turbo", 1)):
        variant = VARIANTS[name]
        request = Settings(size="tiny", variant=name).request(variant).resolve(variant)
        one, two = texts(request, 1, 8), texts(request, 2, 8)
        assert len(one) == number
        assert not set(one) & set(two)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "either size, for random weights, or model must be given"),
        ({"size": "tiny", "model": "demo"}, "leave the other out"),
        ({"size": "huge"}, "size must be one of tiny, small, wide, real, got 'huge'"),
        ({"size": "tiny", "rounds": 0}, "rounds must be 1 or more, got 0"),
        ({"size": "tiny", "stages": ("encode", "paint")}, "stages must be of encode, .*, got paint"),
        ({"size": "tiny", "stages": ()}, "got none"),
        ({"size": "tiny", "only": "diffusers"}, "only can be zimage, got 'diffusers'"),
        ({"size": "tiny", "variant": "fast"}, "variant must be one of base, turbo, got 'fast'"),
        ({"size": "tiny", "height": 250}, "height must be a multiple of 16, got 250; try 240 or 256"),
        ({"size": "tiny", "width": 0}, "width"),
        ({"size": "tiny", "steps": 0}, "num_inference_steps"),
        (
            {"size": "tiny", "weight_dtype": "full"},
            "weight_dtype can be int8, float8, nf4 here, or left out; got 'full'",
        ),
        ({"size": "tiny", "weight_dtype": "nf4", "quantize_activations": True}, "needs weight_dtype='int8' or .*'nf4'"),
        ({"size": "tiny", "quantize_activations": True}, "needs weight_dtype='int8' or weight_dtype='float8', it was"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Settings(**options)
