"""Requests that nobody thought of agree with diffusers: sizes, steps, guidance, schedules and texts drawn at random."""

from __future__ import annotations

import unicodedata
import warnings
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage import ZImageWarning

if TYPE_CHECKING:
    from conftest import Pairs

sides = st.integers(1, 10).map(lambda tokens: 16 * tokens)
texts = st.text(max_size=80)
schedules = st.lists(st.integers(1, 1000), min_size=1, max_size=4, unique=True).map(
    lambda thousandths: [value / 1000 for value in sorted(thousandths, reverse=True)]
)
guided = st.fixed_dictionaries(
    {
        "guidance": st.floats(0.05, 6.0),
        "cfg_normalization": st.one_of(st.booleans(), st.floats(0.2, 2.0)),
        "cfg_truncation": st.one_of(st.just(1.0), st.floats(0.0, 1.0)),
    }
)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    prompts = draw(st.lists(texts, min_size=1, max_size=2))
    options: dict[str, Any] = {
        "prompt": prompts,
        "height": draw(sides),
        "width": draw(sides),
        "seed": draw(st.integers(0, 2**32 - 8)),
        "num_images_per_prompt": draw(st.integers(1, 2)),
    }
    sigmas = draw(st.none() | schedules)
    options |= {"steps": draw(st.integers(1, 4))} if sigmas is None else {"sigmas": sigmas, "steps": len(sigmas)}
    if draw(st.booleans()):
        options |= draw(guided)
        options["negative_prompt"] = [draw(texts) for _ in prompts]
    return options


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(options=requests())
def test_latents_agree(pairs: Pairs, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZImageWarning)  # rare characters take several tokens; a few texts are cut
        outcome = pairs("base").run(**options)
    assert outcome.error <= 1e-5


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(prompt=texts)
def test_caption_features_agree(pairs: Pairs, prompt: str) -> None:
    pair = pairs("base")
    encoder = pair.ours.text_encoder
    ours = encoder.encode(encoder.tokenize(prompt, 512))
    (theirs,), _ = pair.theirs.encode_prompt([prompt], do_classifier_free_guidance=False)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    normal = unicodedata.normalize("NFC", prompt)
    assert torch.equal(encoder.encode(encoder.tokenize(normal, 512)), ours)
