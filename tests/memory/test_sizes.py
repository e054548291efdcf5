"""Counts are those of the models, and the formulas of peaks those of the code, run without memory at the real size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage.checkpoint.modules import Blank
from zimage.checkpoint.sizes import sizes_of_blanks
from zimage.memory.meter import AllocationMeter
from zimage.memory.sizes import (
    RELEASED,
    TOGETHER,
    Work,
    decode_activations,
    denoise_activations,
    encode_activations,
    text_activations,
    together,
    widened_weight,
)
from zimage.models import rowwise, strips
from zimage.models.attention import apart
from zimage.models.autoencoder import Autoencoder
from zimage.models.control import Control, Steering, build
from zimage.models.layers import row_kind
from zimage.models.precision import DTYPES, cast, residual_dtype
from zimage.models.quantized import quantize
from zimage.models.transformer import Caption
from zimage.sampling.guidance import guide
from zimage.testing.configs import SIZES, controlnet_config

pytestmark = pytest.mark.no_cover  # the code of whole models, run at many sizes
Blanks = Callable[[str], dict[str, Blank]]
WORKS = [
    ("real", Work(height=1024, width=1024, tokens=96, dtype="bfloat16")),
    ("real", Work(height=1280, width=768, tokens=512, dtype="bfloat16")),
    ("real", Work(height=1024, width=1024, tokens=512, dtype="float16")),
    ("real", Work(height=512, width=768, tokens=160, dtype="float32")),
    ("small", Work(height=512, width=512, tokens=64, dtype="bfloat16")),
    ("small", Work(height=512, width=512, tokens=64, dtype="float32")),
    ("small", Work(height=512, width=512, tokens=64, dtype="float16")),
]


@pytest.fixture(autouse=True)
def no_strip_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of the same shape need the same memory: of a picture's eight or ten the first, the last and one between
    are computed, for each norm."""
    usual = strips.strips_of

    def of_each_shape(*given: int) -> Iterator[strips.Strip]:
        shapes = {(one.end - one.begin, one.first - one.begin, one.last - one.first): one for one in usual(*given)}
        yield from shapes.values()

    monkeypatch.setattr(strips, "strips_of", of_each_shape)


@contextmanager
def no_scores() -> Iterator[None]:
    """Attention as devices have it: no table of scores, which the meta device would make."""
    usual = torch.nn.functional.scaled_dot_product_attention

    def attention(*given: Any, **named: Any) -> Tensor:
        return torch.empty_like(given[0] if given else named["query"])

    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = usual


def peak(run: Callable[[], Any]) -> int:
    with torch.no_grad(), no_scores(), AllocationMeter() as meter:
        run()
    return meter.peak


def test_the_released_sizes_are_those_of_the_real_checkpoint(blanks: Blanks) -> None:
    assert replace(sizes_of_blanks(blanks("real")), in_bfloat16=True) == RELEASED
    assert RELEASED.transformer == pytest.approx(6.155e9, rel=1e-3)


@pytest.mark.parametrize(("size", "work"), WORKS)
def test_a_prompt(blanks: Blanks, size: str, work: Work) -> None:
    model = blanks(size)["text_encoder"].module
    cast(model, dtype=DTYPES[work.dtype])
    ids = torch.zeros(1, work.tokens, dtype=torch.long, device="meta")
    model.rotary_emb.to("meta")
    seen = peak(lambda: model(input_ids=ids, attention_mask={"full_attention": None}, use_cache=False))
    assert text_activations(sizes_of_blanks(blanks(size)), work) == pytest.approx(seen, rel=0.1)


@pytest.mark.parametrize(("size", "work"), WORKS)
def test_a_guided_step(blanks: Blanks, size: str, work: Work) -> None:
    model = blanks(size)["transformer"].module
    cast(model, dtype=DTYPES[work.dtype])
    tokens = -(-work.tokens // 32) * 32

    def step() -> None:
        captions = [Caption(torch.empty(1, tokens, model.config.dim, device="meta", dtype=model.dtype))] * 2
        latents = torch.empty(1, 16, work.height // 8, work.width // 8, device="meta")
        grid = model.grid(*latents.shape[2:], tokens)
        levels = model.modulations(torch.empty(50, device="meta"))
        if 2 * (grid.padded + tokens) <= TOGETHER:
            guide(*model.denoise_together(latents, captions, [grid, grid], levels[0]), 4.0)
            return
        refined = model.refine(latents, grid, levels[0])
        for caption in captions:
            model.denoise(latents, caption, grid, levels[0], refined).float()

    seen = peak(step)
    planned = denoise_activations(sizes_of_blanks(blanks(size)), work)
    if work.dtype == "float16" and size == "small":  # together they need less than rounded activations do (see below)
        assert seen <= planned <= 1.15 * seen
    else:
        assert planned == pytest.approx(seen, rel=0.1)


@pytest.mark.parametrize(("size", "work"), [WORKS[2], *WORKS[4:]])
def test_a_step_without_guidance(blanks: Blanks, size: str, work: Work) -> None:
    """Nothing is kept for another branch, so it needs a stream less than is planned for."""
    model = blanks(size)["transformer"].module
    cast(model, dtype=DTYPES[work.dtype])
    tokens = -(-work.tokens // 32) * 32

    def step() -> None:
        caption = Caption(torch.empty(1, tokens, model.config.dim, device="meta", dtype=model.dtype))
        latents = torch.empty(1, 16, work.height // 8, work.width // 8, device="meta")
        levels = model.modulations(torch.empty(50, device="meta"))
        model.denoise(latents, caption, model.grid(*latents.shape[2:], tokens), levels[0]).float()

    seen = peak(step)
    assert seen <= denoise_activations(sizes_of_blanks(blanks(size)), replace(work, together=0)) <= 1.15 * seen


@pytest.mark.parametrize(("size", "work", "version"), [(*WORKS[4], "2.1"), (*WORKS[5], "1.0"), (*WORKS[6], "2.0")])
def test_a_guided_step_with_a_controlnet(blanks: Blanks, size: str, work: Work, version: str) -> None:
    work = replace(work, together=0)
    model, config = blanks(size)["transformer"].module, controlnet_config(SIZES[size], version)
    config["control_layers_places"] = [0, 4]
    net = build({name: value for name, value in config.items() if not name.startswith("_")})
    for module in (model, net):
        cast(module, dtype=DTYPES[work.dtype])
    tokens = -(-work.tokens // 32) * 32

    def step() -> None:
        stream = residual_dtype(DTYPES[work.dtype])
        captions = [Caption(torch.empty(1, tokens, model.config.dim, device="meta", dtype=stream))] * 2
        latents = torch.empty(1, 16, work.height // 8, work.width // 8, device="meta")
        context = torch.empty(1, config["control_in_dim"], *latents.shape[2:], device="meta")
        grid = model.grid(*latents.shape[2:], tokens)
        levels = model.modulations(torch.empty(50, device="meta"))
        steering = Steering(model, Control(net, context, 1.0), [number / 50 for number in range(50)], grid)
        refined = model.refine(latents, grid, levels[0])
        beside = steering.at(latents, grid, 0.0, levels[0], refined)
        for caption in captions:
            model.denoise(latents, caption, grid, levels[0], refined, beside(caption, grid)).float()

    blocks = len(net.control_layers) + len(net.control_noise_refiner or ())
    sizes = replace(sizes_of_blanks(blanks(size)), control_blocks=blocks)
    seen = peak(step)
    assert denoise_activations(sizes, work) == pytest.approx(seen, rel=0.1)
    assert denoise_activations(replace(sizes, control_blocks=0), work) < 0.9 * seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [32, 96, 512, 1024, 1504])
def test_no_picture_of_both_branches_together_needs_more_than_a_larger_one(dtype: str, tokens: int) -> None:
    """Nor does one with a ControlNet at hand that does not steer it."""
    native = denoise_activations(RELEASED, Work(tokens=tokens, dtype=dtype))
    counted = []
    for side in range(64, 1024, 16):
        work = Work(height=side, width=side, tokens=tokens, dtype=dtype)
        assert denoise_activations(RELEASED, work) <= native
        assert denoise_activations(replace(RELEASED, control_blocks=17), work) >= denoise_activations(RELEASED, work)
        counted.append(together(side, side, tokens))
    assert min(counted) == 0
    assert 0.9 * TOGETHER < max(counted) <= TOGETHER


@pytest.mark.parametrize("strip_levels", [0, 1, 2])
@pytest.mark.parametrize(("size", "work"), WORKS)
def test_a_decode(blanks: Blanks, size: str, work: Work, strip_levels: int) -> None:
    model = blanks(size)["vae"].module
    cast(model, dtype=DTYPES[work.dtype])
    latents = torch.empty(1, 16, work.height // 8, work.width // 8, device="meta", dtype=model.dtype)
    seen = peak(lambda: Autoencoder(model)._pixels(latents, strip_levels))
    assert decode_activations(sizes_of_blanks(blanks(size)), work, strip_levels) == pytest.approx(seen, rel=0.1)


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("by_device", [False, True], ids=["widened", "the device's product"])
@pytest.mark.parametrize(("size", "work"), [*WORKS[1:4], ("real", replace(WORKS[2][1], height=640, width=640))])
def test_rounded_activations_are_within_what_a_step_is_planned_for(
    blanks: Blanks, monkeypatch: pytest.MonkeyPatch, size: str, work: Work, kind: str, by_device: bool
) -> None:
    """Of a block, which needs the most, with products in int32 or float32 that are scaled afterwards."""
    monkeypatch.setattr(rowwise, "has_product", lambda *_: by_device)
    model = copy.deepcopy(blanks(size)["transformer"].module)
    cast(model, dtype=DTYPES[work.dtype])
    quantize(model, kind, "layers", activations=True)
    tokens = (work.height // 16) * (work.width // 16) + -(-work.tokens // 32) * 32
    is_both = 2 * tokens <= TOGETHER
    stream = torch.empty(
        1, 2 * tokens if is_both else tokens, model.config.dim, device="meta", dtype=residual_dtype(DTYPES[work.dtype])
    )
    grid = model.grid(work.height // 8, work.width // 8, -(-work.tokens // 32) * 32)
    (level,) = model.modulations(torch.empty(1, device="meta"))
    block = model.layers[0]
    assert row_kind(block.feed_forward.w2) == kind

    turns = torch.cat([grid.rotations] * 2, dim=1) if is_both else grid.rotations
    own = {"attend": apart(model.attend, [tokens, tokens])} if is_both else {}
    seen = peak(lambda: model._run_block(block, stream, turns, level.blocks[-1], **own))
    sizes = sizes_of_blanks(blanks(size))
    assert seen <= denoise_activations(sizes, work) + widened_weight(sizes, work)[1]


@pytest.mark.parametrize("strip_levels", [0, 1, 2])
@pytest.mark.parametrize(("size", "work"), WORKS)
def test_an_encode(blanks: Blanks, size: str, work: Work, strip_levels: int) -> None:
    """At these sizes it needs less than a decode, so a picture that fits can also start from an image."""
    model, sizes = blanks(size)["vae"].module, sizes_of_blanks(blanks(size))
    cast(model, dtype=DTYPES[work.dtype])
    shape = 1, 3, work.height, work.width

    def encode() -> None:
        image = torch.empty(shape, device="meta")
        wide = (image * 2.0 - 1.0).to(model.dtype)
        Autoencoder(model)._moments(wide, strip_levels)

    seen = peak(encode)
    assert encode_activations(sizes, work, strip_levels) == pytest.approx(seen, rel=0.1)
    assert seen < decode_activations(sizes, work, strip_levels)
