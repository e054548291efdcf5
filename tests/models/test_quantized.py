"""Weights of 8 and 4 bits: how far they are from the plain ones, which layers keep theirs, and the pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from zimage import NotEnoughMemory, RequestError, ZImagePipeline, ZImageWarning
from zimage.memory.peaks import predict
from zimage.memory.ring import STAYS
from zimage.models.quantized import NF4_LEVELS, SKIPPED, QuantizedLinear, quantize, quantize_rows
from zimage.testing import build_checkpoint
from zimage.testing.configs import SIZES

pytestmark = pytest.mark.no_cover  # every line is counted in other tests; here that takes a third of the time
KINDS = ("int8", "float8", "nf4")
PICTURE: dict[str, Any] = {
    "height": 128, "width": 128, "any_size": True, "num_inference_steps": 3, "seed": 4, "progress": False,
}  # fmt: skip
SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
"""Of pictures of which the bits are compared."""


def layer_of(weight: Tensor, kind: str, bias: Tensor | None = None) -> QuantizedLinear:
    rows, columns = weight.shape
    with torch.device("meta"):
        plain = nn.Linear(columns, rows, bias=bias is not None)
    layer = QuantizedLinear(plain, kind)
    stored = quantize_rows(weight, kind)
    assert [one.shape for one in stored] == [layer.weight.shape, layer.scale.shape]
    assert [one.dtype for one in stored] == [layer.weight.dtype, layer.scale.dtype]
    layer.weight, layer.scale = (nn.Parameter(one, requires_grad=False) for one in stored)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
)
def test_the_error_of_each_weight_is_bounded(rows: int, blocks: int, seed: int, scale: float) -> None:
    """By half a step of int8; by 2⁻⁴ of itself in float8, or half its smallest step; by half of NF4's widest gap."""
    weight = scale * random(rows, 64 * blocks, seed)
    most = weight.abs().amax(dim=1, keepdim=True)
    error = {kind: (layer_of(weight, kind).widened(torch.float32) - weight).abs() for kind in KINDS}
    assert (error["int8"] <= 0.5051 * most / 127 + most * 2**-8).all()
    assert error["int8"].mean() <= 0.35 * most.max() / 127
    assert (error["float8"] <= torch.maximum(weight.abs() / 16, most / 448 * 2**-9) + most * 2**-8).all()
    largest = weight.unflatten(1, (-1, 64)).abs().amax(dim=2, keepdim=True).expand(-1, -1, 64).flatten(1)
    assert (error["nf4"] <= 0.1520 * largest).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_each_other(kind: str) -> None:
    weight = random(6, 128)
    weight[2] *= 1000
    weight[4] = 0
    whole = layer_of(weight, kind).widened(torch.float32)
    for number, row in enumerate(weight):
        assert torch.equal(layer_of(row[None], kind).widened(torch.float32)[0], whole[number])
    assert not whole[4].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_a_product_with_its_widened_weight(kind: str, dtype: torch.dtype) -> None:
    weight, bias, hidden = random(96, 128), random(1, 96)[0].to(dtype), random(7, 128, 1).to(dtype)
    layer = layer_of(weight, kind, bias)
    result = layer(hidden)
    assert result.dtype == dtype
    widened = layer.widened(dtype)
    assert widened.dtype == dtype
    assert torch.equal(result, nn.functional.linear(hidden, widened, bias))
    # Scales are bfloat16 numbers, so that no compute type but float16 rounds them again.
    assert torch.equal(layer.scale, layer.scale.bfloat16().float()) == (kind != "nf4")


def test_the_levels_of_nf4_are_quantiles_of_the_normal_distribution() -> None:
    """arXiv 2305.14314, appendix E: eight of the negative and nine of the positive half share a zero."""
    offset = 1 - 0.5 * (1 / 32 + 1 / 30)

    def quantiles(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(offset, 0.5, count, dtype=torch.float64))[:-1]

    levels = torch.cat([quantiles(9), torch.zeros(1, dtype=torch.float64), -quantiles(8)]).sort().values
    expected = levels / levels.abs().max()
    torch.testing.assert_close(torch.tensor(NF4_LEVELS, dtype=torch.float64), expected, rtol=0, atol=2e-4)


def test_nf4_rounds_to_the_nearest_level_also_beside_the_boundaries() -> None:
    levels = torch.tensor(NF4_LEVELS)
    between = (levels[1:] + levels[:-1]) / 2
    above, below = (torch.nextafter(between, torch.full_like(between, side)) for side in (2.0, -2.0))
    row = torch.cat([levels, between, above, below, torch.linspace(-1, 1, 451)])
    row = torch.cat([row, torch.ones(-len(row) % 64)]).unflatten(0, (-1, 64))
    row[:, 0] = 1.0  # so that every block of 64 has the scale 1
    stored, scale = quantize_rows(row.flatten()[None], "nf4")
    assert (scale == 1.0).all()
    numbers = torch.stack([stored >> 4, stored & 15], dim=-1).flatten()
    assert torch.equal(numbers, torch.bucketize(row.flatten(), between).byte())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_comes_from_the_host_when_weights_are_widened(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card would be waited for, layer by layer, and a CUDA graph could not be recorded."""
    layer = layer_of(random(50, 128), kind)
    expected = layer.widened(torch.bfloat16)
    monkeypatch.setattr(torch, "tensor", None)
    for around in (torch.no_grad, torch.inference_mode):
        with around():
            assert torch.equal(layer.widened(torch.bfloat16), expected)


def test_nf4_is_widened_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(random(50, 128), "nf4")
    whole = layer.widened(torch.float32)
    monkeypatch.setattr("zimage.models.quantized.NF4_PIECE", 128 * 7)
    assert torch.equal(layer.widened(torch.float32), whole)


def test_what_keeps_its_type() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.Linear(128, 64)
            self.narrow = nn.Linear(32, 64)
            self.norm = nn.LayerNorm(64)
            self.adaLN_modulation = nn.Sequential(nn.Linear(64, 64))

    with torch.device("meta"):
        model = nn.ModuleDict({"layers": nn.ModuleList([Block()]), "embedder": nn.Linear(64, 64)})
    holder: Any = nn.Module()
    holder.layers, holder.embedder = model["layers"], model["embedder"]
    quantize(holder, "nf4", "layers")
    (block,) = holder.layers
    assert isinstance(block.attention, QuantizedLinear)
    assert type(block.narrow) is type(holder.embedder) is type(block.adaLN_modulation[0]) is nn.Linear
    assert SKIPPED == (STAYS,), "what keeps its type is what stays on the device"
    assert "kind=nf4" in repr(block)


@pytest.fixture(scope="module")
def folder(shallow_folder: Path) -> Path:
    return shallow_folder


def load(folder: Path, dtype: str = "float32", **options: Any) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, device="cpu", dtype=dtype, **options)


def latents(pipe: ZImagePipeline, **options: Any) -> Tensor:
    return pipe("a fox", output_type="latent", **{**PICTURE, **options}).images  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    return latents(load(folder))


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("float8", 0.07), ("nf4", 0.25)])
def test_pictures_are_near_the_plain_ones(folder: Path, expected: Tensor, kind: str, most: float) -> None:
    """On random weights, which have no room to spare; the float32 values of bfloat16 weights are 0.003 away."""
    pipe = load(folder, weight_dtype=kind)
    made = latents(pipe)
    distance = (made - expected).norm() / expected.norm()
    assert 1e-4 < distance <= most
    assert pipe.weights == kind
    assert pipe("a fox", **{**PICTURE, **SMALL}).images[0].recipe.runtime["weights"] == kind  # type: ignore[union-attr]
    for model in (pipe.text_encoder.model, pipe.transformer):
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                assert "adaLN" in name or not name.startswith(("layers", "noise_refiner", "context_refiner"))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_rounded_as_they_are_loaded(folder: Path, kind: str) -> None:
    plain, pipe = load(folder), load(folder, weight_dtype=kind)
    for name in ("layers.2.feed_forward.w2", "context_refiner.0.attention.to_q"):
        stored = quantize_rows(plain.transformer.get_submodule(name).weight, kind)
        layer = pipe.transformer.get_submodule(name)
        assert torch.equal(layer.weight.view(torch.uint8), stored[0].view(torch.uint8))
        assert torch.equal(layer.scale, stored[1])


@pytest.mark.parametrize(("kind", "source"), [("int8", "memory"), ("float8", "files"), ("nf4", "files")])
def test_they_pass_through_the_device_with_the_same_bits(turbo_folder: Path, kind: str, source: str) -> None:
    pipe = load(turbo_folder, weight_dtype=kind)
    made = latents(pipe, **SMALL)
    assert pipe.plan is not None
    placement = replace(
        pipe.plan.placement, text_encoder="streamed", resident_blocks=2, context_resident=False, slots=2,
        text_source=source, block_source=source,
    )  # fmt: skip
    streamed = load(turbo_folder, memory=replace(pipe.plan, placement=placement))
    assert streamed.weights == kind
    assert torch.equal(latents(streamed, **SMALL), made)
    pipe.enable_sequential_cpu_offload()
    pipe.text_encoder.forget()
    assert torch.equal(latents(pipe, **SMALL), made)


def test_bfloat16_files_stay_so_where_float32_does_not_fit(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word, since it is the same picture; streamed too."""
    monkeypatch.setitem(SIZES, "small", replace(SIZES["small"], n_layers=2, n_refiner_layers=1, text_layers=3))
    folder = build_checkpoint(tmp_path / "model", size="small", dtype="bfloat16")
    full = load(folder)
    made = latents(full, **SMALL)
    assert full.plan is not None
    assert (full.weights, full.plan.sizes.in_bfloat16) == (None, True)
    matrices = sum((*full.plan.sizes.blocks, *full.plan.sizes.text_layers))
    tight = int((max(stage.device for stage in full.plan.stages) - matrices) / 0.9)
    pipe = load(folder, memory=tight)
    assert pipe.weights == "bfloat16"
    assert pipe.transformer.layers[0].attention.to_q.weight.dtype == torch.bfloat16
    assert torch.equal(latents(pipe, **SMALL), made)
    assert not [one for one in recwarn if one.category is ZImageWarning]
    pipe.enable_sequential_cpu_offload()
    pipe.text_encoder.forget()
    assert torch.equal(latents(pipe, **SMALL), made)
    assert load(folder, memory=tight, weight_dtype="full").weights is None
    assert load(folder, "bfloat16", memory=tight).weights is None


def test_float32_files_are_not_rounded_to_bfloat16_unasked(folder: Path, expected: Tensor) -> None:
    full = load(folder)
    assert full.plan is not None
    assert not full.plan.sizes.in_bfloat16
    tight = int((max(stage.device for stage in full.plan.stages) - sum(full.plan.sizes.text_layers)) / 0.9)
    pipe = load(folder, memory=tight)
    assert pipe.weights is None
    assert torch.equal(latents(pipe), expected)
    asked = load(folder, weight_dtype="bfloat16")
    assert asked.weights == "bfloat16"
    assert 1e-4 < (latents(asked) - expected).norm() / expected.norm() < 0.013


def test_the_plan_takes_int8_where_it_must_and_says_so(folder: Path) -> None:
    full = load(folder, "bfloat16").plan
    assert full is not None
    frugal = replace(
        full.placement, text_encoder="streamed", resident_blocks=0, context_resident=False, slots=2, strip_levels=2
    )
    work = replace(full.work, height=full.sizes.native_side // 4, width=full.sizes.native_side // 4)
    tight = int((max(one.device for one in predict(full.sizes, work, full.budget, frugal)) - 2**16) / 0.9)
    with pytest.warns(ZImageWarning, match=r"do not fit in \d+ in bfloat16, so they are stored in int8, which changes"):
        pipe = load(folder, "bfloat16", memory=tight)
    assert pipe.weights == "int8"
    with pytest.raises(NotEnoughMemory, match="does not fit"):
        load(folder, "bfloat16", memory=tight, weight_dtype="full")
    assert load(folder, "bfloat16", memory=tight, weight_dtype="int8").weights == "int8"


def test_what_cannot_be_done_with_them_is_said(folder: Path, tmp_path: Path) -> None:
    pipe = load(folder, weight_dtype="int8")
    for refused in (lambda: pipe.to(torch.bfloat16), lambda: pipe.save_pretrained(tmp_path / "new")):
        with pytest.raises(RequestError, match=r"stored in int8, so it cannot be .*weight_dtype='full'"):
            refused()
    assert not (tmp_path / "new").exists()
    with pytest.raises(
        RequestError, match="weight_dtype must be full, bfloat16, int8, float8, nf4, or left out; got 'int4'"
    ):
        load(folder, weight_dtype="int4")
    with pytest.raises(RequestError, match="memory is a plan, which says what weights are stored as"):
        load(folder, memory=pipe.plan, weight_dtype="int8")


def test_predicted_sizes_are_those_of_the_parameters(folder: Path) -> None:
    for kind in KINDS:
        pipe = load(folder, "bfloat16", weight_dtype=kind)
        assert pipe.plan is not None
        models = (pipe.text_encoder.model, pipe.transformer, pipe.autoencoder.vae)
        held = sum(weight.numel() * weight.element_size() for model in models for weight in model.parameters())
        full = load(folder, "bfloat16").plan
        assert full is not None
        weights = 2 * (full.sizes.text_encoder + full.sizes.transformer + full.sizes.vae)
        saved = full.stages[2].device - pipe.plan.stages[2].device
        assert weights - held == pytest.approx(saved, rel=0.02)
