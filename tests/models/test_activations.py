"""Pipelines whose transformer multiplies in 8 bits on both sides: which layers do, what they share, and the pictures.

A CPU widens such products again, with a warning; where `way` says so it takes torch's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zimage import NotEnoughMemory, RequestError, ZImagePipeline, ZImageWarning
from zimage.memory.planner import make_plan
from zimage.memory.sizes import RELEASED
from zimage.models import layers, rowwise
from zimage.models.compiled import compile_blocks
from zimage.models.layers import normalize, row_kind
from zimage.models.quantized import QuantizedLinear
from zimage.models.rowwise import Quantized, Rows

KINDS = ["int8", "float8"]
PICTURE: dict[str, Any] = {"height": 128, "width": 128, "num_inference_steps": 2, "seed": 4, "any_size": True}
IN_BLOCK = {"attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"} | {
    f"feed_forward.w{number}" for number in (1, 2, 3)
}


def load(folder: Path, kind: str = "int8", **options: Any) -> ZImagePipeline:
    options = {"weight_dtype": kind, "quantize_activations": True, **options}
    with pytest.warns(ZImageWarning, match="7 of 7 layers that round activations widen them again on cpu"):
        return ZImagePipeline.from_pretrained(folder, **{"device": "cpu", "dtype": "float32", **options})


def plain(folder: Path, **options: Any) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, device="cpu", **{"dtype": "float32", **options})


def latents(pipe: ZImagePipeline, **options: Any) -> Tensor:
    made = pipe("a fox", output_type="latent", progress=False, **{**PICTURE, **options}).images
    assert isinstance(made, Tensor)
    return made


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture(scope="module")
def expected(turbo_folder: Path) -> Tensor:
    return latents(plain(turbo_folder))


@pytest.fixture(params=[False, True], ids=["widened", "the device's product"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(rowwise, "has_product", lambda *_: request.param)
    return bool(request.param)


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what is rounded."""
    shapes: list[tuple[int, ...]] = []

    def noting(hidden: Tensor, kind: str | None) -> Rows:
        if kind is not None:
            shapes.append(tuple(hidden.shape))
        return rowwise.rounded(hidden, kind)

    monkeypatch.setattr(layers, "rounded", noting)
    monkeypatch.setattr("zimage.models.quantized.rounded", noting)
    return shapes


def test_which_layers_round_their_input(turbo_folder: Path) -> None:
    """Not the text encoder's, the refiners' and the last block's; no layer does unless it is asked for."""
    pipe = load(turbo_folder)
    rounding: dict[str, set[str]] = {}
    for model in (pipe.text_encoder.model, pipe.transformer):
        for name, layer in model.named_modules():
            if getattr(layer, "rows", None):
                part, number, path = name.split(".", 2)
                assert layer.rows == layer.kind == "int8"
                rounding.setdefault(f"{part}.{number}", set()).add(path)
    names = [f"layers.{number}" for number in range(len(pipe.transformer.layers) - 1)]
    assert rounding == dict.fromkeys(names, IN_BLOCK)
    off = plain(turbo_folder, weight_dtype="int8").transformer
    assert {layer.rows for layer in off.modules() if isinstance(layer, QuantizedLinear)} == {None}


@pytest.mark.parametrize(("kind", "most", "dtype"), [("int8", 0.03, "float32"), ("float8", 0.1, "float16")])
def test_pictures_are_near_the_plain_ones(
    turbo_folder: Path, expected: Tensor, way: bool, kind: str, most: float, dtype: str
) -> None:
    made = latents(load(turbo_folder, kind, dtype=dtype))
    weights_only = latents(plain(turbo_folder, weight_dtype=kind))
    assert 1e-4 < distance(made, expected) <= most
    assert distance(made, weights_only) > 1e-4


def test_what_several_layers_share_is_rounded_once(turbo_folder: Path, roundings: list[tuple[int, ...]]) -> None:
    """Four times in a block: for queries, keys and values; the output; gate and content; and their product."""
    pipe = load(turbo_folder)
    latents(pipe, num_inference_steps=1)
    dim, hidden = pipe.transformer.config.dim, pipe.transformer.layers[0].feed_forward.w2.in_features
    blocks = len(pipe.transformer.layers) - 1
    assert Counter(shape[-1] for shape in roundings) == {dim: 3 * blocks, hidden: blocks}


def test_row_kind_is_what_all_agree_on() -> None:
    def layer(kind: str, rows: str | None) -> QuantizedLinear:
        return QuantizedLinear(nn.Linear(8, 8), kind, rows)

    eight, other, wide = layer("int8", "int8"), layer("int8", "int8"), layer("int8", None)
    assert row_kind(eight) == row_kind(eight, other) == "int8"
    assert row_kind(layer("float8", "float8")) == "float8"
    for modules in ((wide,), (eight, wide), (eight, nn.Linear(8, 8)), (eight, layer("float8", "float8"))):
        assert row_kind(*modules) is None
    other.register_forward_hook(lambda *_: None)
    assert row_kind(eight, other) is None


class Adapted(nn.Module):
    """What an adapter puts in a layer's place."""

    def __init__(self, base: nn.Module, seen: list[Any]) -> None:
        super().__init__()
        self.base, self.seen = base, seen

    def forward(self, hidden: Any) -> Any:
        self.seen.append(hidden)
        return self.base(hidden)


@pytest.mark.parametrize("name", ["attention.to_k", "feed_forward.w3", "feed_forward.w2", "attention.to_out.0"])
@pytest.mark.parametrize("how", ["replaced", "hooked"])
def test_what_is_not_ours_takes_plain_tokens(turbo_folder: Path, name: str, how: str) -> None:
    """And so do those that share them, which then round by themselves: the bits do not change."""
    pipe, seen = load(turbo_folder), list[Any]()
    before = latents(pipe)
    block = pipe.transformer.layers[0]
    layer = block.get_submodule(name)
    if how == "hooked":
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    else:
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, Adapted(layer, seen))
    assert torch.equal(latents(pipe), before)
    assert len(seen) == PICTURE["num_inference_steps"]
    assert {type(one) for one in seen} == {Tensor}


def test_gradients_reach_what_is_before_a_rounding_layer(turbo_folder: Path) -> None:
    block = load(turbo_folder).transformer.layers[0]
    hidden = torch.randn(1, 20, block.attention.to_q.in_features, requires_grad=True)
    tokens = normalize(block.attention_norm1, hidden, None, row_kind(block.attention.to_q))
    assert isinstance(tokens, Tensor)
    (gradient,) = torch.autograd.grad(block.attention.to_q(tokens).sum(), hidden)
    assert gradient.norm() > 0
    with torch.no_grad():
        assert isinstance(normalize(block.attention_norm1, hidden, None, "int8"), Quantized)


def test_infinity_is_noticed_and_computed_again(turbo_folder: Path, way: bool) -> None:
    """In float16, where a rounded row could hide it: values of 1e5 and more, which the next layer makes small again."""
    pipe = load(turbo_folder, dtype="float16")
    layer = pipe.transformer.layers[0].attention.to_v
    made = latents(pipe)
    with torch.no_grad():
        layer.scale.mul_(2.0**22)
        layer_after = pipe.transformer.layers[0].attention.to_out[0]
        layer_after.scale.mul_(2.0**-22)
    again = latents(pipe)
    assert again.isfinite().all()
    assert distance(again, made) < 0.03


@pytest.mark.parametrize(("kind", "source"), [("int8", "memory"), ("float8", "files")])
def test_they_pass_through_the_device_with_the_same_bits(turbo_folder: Path, way: bool, kind: str, source: str) -> None:
    pipe = load(turbo_folder, kind)
    made = latents(pipe)
    assert pipe.plan is not None
    placement = replace(
        pipe.plan.placement, text_encoder="streamed", resident_blocks=2, context_resident=False, slots=2,
        text_source=source, block_source=source,
    )  # fmt: skip
    asked: dict[str, Any] = {"weight_dtype": None, "quantize_activations": False}
    streamed = load(turbo_folder, memory=replace(pipe.plan, placement=placement), **asked)
    assert (streamed.weights, streamed.activations) == (kind, kind)
    assert torch.equal(latents(streamed), made)
    pipe.enable_sequential_cpu_offload()
    pipe.text_encoder.forget()
    assert pipe.activations == kind
    assert torch.equal(latents(pipe), made)


def test_memory_that_runs_out_changes_nothing(turbo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(turbo_folder)
    made, failed = latents(pipe), list[int]()
    product = rowwise.multiplied

    def fails_twice(*given: Any) -> Tensor:
        if len(failed) < 2:
            failed.append(1)
            raise torch.OutOfMemoryError("no room")
        return product(*given)

    monkeypatch.setattr("zimage.models.quantized.multiplied", fails_twice)
    assert torch.equal(latents(pipe), made)
    assert pipe.plan is not None
    assert len(pipe.plan.stepped_down) == 1
    assert pipe.activations == "int8"


def test_plan_and_recipe_say_so(turbo_folder: Path) -> None:
    pipe = load(turbo_folder)
    assert pipe.plan is not None
    assert "decode whole, weights and the transformer's activations in int8" in str(pipe.plan)
    assert pipe.plan.to_dict()["placement"]["quantize_activations"] is True
    image = pipe("a fox", progress=False, **PICTURE).images[0]
    recipe = image.recipe  # type: ignore[union-attr]
    assert (recipe.runtime["weights"], recipe.runtime["activations"]) == ("int8", "int8")
    assert pipe.replay(recipe).same_bits
    other = plain(turbo_folder, weight_dtype="int8")
    assert other.activations is None
    assert "activations was int8, here it is full" in other.replay(recipe).differences


def test_what_it_cannot_be_asked_for_with(turbo_folder: Path) -> None:
    for kind, got in ((None, "it was left out"), ("full", "got 'full'"), ("nf4", "got 'nf4'"), ("bfloat16", "got 'b")):
        with pytest.raises(
            RequestError, match="quantize_activations=True needs weight_dtype='int8' or weight_dtype='float8', " + got
        ):
            plain(turbo_folder, weight_dtype=kind, quantize_activations=True)
    plan = plain(turbo_folder).plan
    with pytest.raises(RequestError, match="leave weight_dtype and quantize_activations out"):
        plain(turbo_folder, memory=plan, quantize_activations=True)
    with pytest.raises(RequestError, match="needs weight_dtype"):
        make_plan(RELEASED, plan.work, plan.budget, quantize_activations=True)  # type: ignore[union-attr]
    with pytest.raises(NotEnoughMemory):
        plain(turbo_folder, memory="1KB", weight_dtype="int8", quantize_activations=True)


def test_compiled_blocks_give_the_same_bits(turbo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler follows rounding and products, without a break, and makes one program for all lengths."""
    monkeypatch.setattr(rowwise, "has_product", lambda *_: True)
    pipe, graphs = load(turbo_folder), list[int]()
    prompts: list[dict[str, Any]] = [{"num_inference_steps": 1}, {"num_inference_steps": 1, "height": 96}]
    before = [latents(pipe, **options) for options in prompts]

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        graphs.append(1)
        return graph.forward  # type: ignore[no-any-return]

    compile_blocks(pipe.transformer, backend)
    torch._dynamo.utils.counters.clear()
    for options, reference in zip(prompts, before, strict=True):
        assert torch.equal(latents(pipe, **options), reference)
    assert pipe.compiled
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(graphs) == 2  # one for blocks that round and one for those that do not
