"""Adapters on weights in fewer bits, on layers that pass through the device, on compiled blocks, and in the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zimage import ZImagePipeline
from zimage.adapters.adapter import Delta
from zimage.adapters.layers import Switch, make_part, put_on, take_off
from zimage.errors import NotEnoughMemory
from zimage.models import ggml
from zimage.models.compiled import compile_blocks
from zimage.models.quantized import PackedLinear, StoredLinear

SCALE = 0.5
Reference = dict[str, tuple[Tensor, Tensor]]
Draw = Callable[..., Tensor]
Checksum = Callable[[ZImagePipeline], str]
WriteLora = Callable[..., Path]


def load(folder: Path, **options: Any) -> ZImagePipeline:
    pipe = ZImagePipeline.from_pretrained(folder, **{"dtype": "float32", "device": "cpu", **options})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_lengths(reference: Reference) -> dict[str, Tensor]:
    """The reference as DoRA."""
    tensors, generator = {}, torch.Generator().manual_seed(5)
    for module, (down, up) in reference.items():
        lengths = torch.rand(len(up), generator=generator) + 0.5
        tensors |= {
            f"{module}.lora_A.weight": down,
            f"{module}.lora_B.weight": up * SCALE,
            f"{module}.dora_scale": lengths,
        }
    return tensors


def merge(pipe: ZImagePipeline, tensors: Mapping[str, Tensor]) -> None:
    """Put plain layers in the place of all, of the weights that they compute with and what the tensors add."""
    for name, layer in list(pipe.transformer.named_modules()):
        if not isinstance(layer, nn.Linear | StoredLinear):
            continue
        weight = layer.widened(torch.float32) if isinstance(layer, StoredLinear) else layer.weight.detach().clone()
        weight = weight + tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        if f"{name}.dora_scale" in tensors:
            weight = F.normalize(weight, dim=1) * tensors[f"{name}.dora_scale"][:, None]
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias  # type: ignore[assignment]
        owner, _, leaf = name.rpartition(".")
        setattr(pipe.transformer.get_submodule(owner), leaf, plain)


@pytest.mark.parametrize("kind", ["int8", "float8", "nf4", "bfloat16"])
def test_weights_in_fewer_bits(
    kind: str, turbo_folder: Path, reference: Reference, write_lora: WriteLora, draw: Draw, checksum: Checksum
) -> None:
    pipe, tensors = load(turbo_folder, weight_dtype=kind), with_lengths(reference)
    before, none = checksum(pipe), draw(pipe)
    pipe.load_adapter(write_lora(tensors), "dora")
    drawn = draw(pipe)
    pipe.delete_adapters("dora")
    assert checksum(pipe) == before
    assert torch.equal(draw(pipe), none)
    assert (drawn - none).abs().max() > 0.1
    merge(pipe, tensors)
    assert torch.allclose(draw(pipe), drawn, rtol=0, atol=2e-4)


def test_weights_as_a_gguf_file_has_them() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = PackedLinear(nn.Linear(64, 32, bias=False), "Q8_0")
    scales = (torch.rand(32, 2, 1, generator=generator) / 100).half().view(torch.uint8)
    numbers = torch.randint(-127, 128, (32, 2, 32), generator=generator).to(torch.int8).view(torch.uint8)
    layer.weight = nn.Parameter(torch.cat([scales, numbers], dim=2).flatten(1), requires_grad=False)
    assert layer.weight.shape[1] == ggml.packed_bytes("Q8_0", 64)
    delta = Delta(
        torch.randn(4, 64, generator=generator), torch.randn(32, 4, generator=generator), SCALE, torch.ones(32)
    )
    hidden, switch = torch.randn(3, 64, generator=generator), Switch()
    plain = layer(hidden)
    put_on(layer, "ink", make_part(delta, layer, torch.device("cpu"), torch.float32), switch)
    assert torch.equal(layer(hidden), plain)
    switch.active = (("ink", torch.tensor(1.0)),)
    weight = F.normalize(layer.widened(torch.float32) + SCALE * delta.up @ delta.down, dim=1)
    assert torch.allclose(layer(hidden), hidden @ weight.T, rtol=0, atol=1e-5)
    take_off(layer, "ink")
    assert type(layer) is PackedLinear
    assert torch.equal(layer(hidden), plain)


@pytest.mark.parametrize("order", ["before", "after"])
def test_layers_that_pass_through(
    order: str, turbo_folder: Path, reference: Reference, write_lora: WriteLora, draw: Draw
) -> None:
    """From the files: the bits of a model that is all there, whichever came first, though DoRA looks at weights."""
    file = write_lora(with_lengths(reference))
    resident = load(turbo_folder)
    none = draw(resident)
    resident.load_adapter(file, "dora")
    expected = draw(resident)
    pipe = load(turbo_folder)
    if order == "before":
        pipe.load_adapter(file, "dora")
    pipe.enable_sequential_cpu_offload()
    if order == "after":
        pipe.load_adapter(file, "dora")
    assert pipe.transformer.layers[0].attention.to_q.weight.is_meta
    assert torch.equal(draw(pipe), expected)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), none)
    assert pipe.transformer.layers[0].attention.to_q.weight.is_meta


def of_rank(rank: int, layers: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    tensors = {}
    for module, (out, features) in layers.items():
        tensors |= {
            f"{module}.lora_A.weight": torch.ones(rank, features) / 99,
            f"{module}.lora_B.weight": torch.ones(out, rank) / 99,
        }
    return tensors  # fmt: skip


def test_the_plan_counts_what_is_loaded(
    turbo_folder: Path, layers: Mapping[str, tuple[int, int]], write_lora: WriteLora
) -> None:
    pipe = load(turbo_folder)
    assert pipe.plan is not None
    before, tensors = pipe.plan, of_rank(8, layers)
    pipe.load_adapter(write_lora(tensors))
    size = sum(tensor.numel() * 4 for tensor in tensors.values())
    assert pipe.plan.sizes.adapters == size
    assert pipe.plan.device_peak == before.device_peak + size
    pipe.unload_lora_weights()
    assert pipe.plan.device_peak == before.device_peak


def test_what_does_not_fit_beside_it_passes_through(
    turbo_folder: Path, layers: Mapping[str, tuple[int, int]], write_lora: WriteLora, draw: Draw
) -> None:
    pipe, free = load(turbo_folder, memory="17.5MB"), load(turbo_folder)
    assert pipe.plan is not None
    assert pipe.plan.placement.text_encoder == "resident"
    file = write_lora(of_rank(8, layers))
    pipe.load_adapter(file)
    free.load_adapter(file)
    assert pipe.plan.placement.text_encoder == "streamed"
    assert pipe.plan.device_peak <= pipe.plan.budget.device
    assert "the adapter 'lora' needed room; since then: text encoder streamed" in pipe.plan.stepped_down[-1]
    assert torch.equal(draw(pipe), draw(free))


def test_what_does_not_fit_at_all_leaves_no_trace(
    turbo_folder: Path, layers: Mapping[str, tuple[int, int]], write_lora: WriteLora, checksum: Checksum, draw: Draw
) -> None:
    pipe = load(turbo_folder, memory="17.5MB")
    before, plan, drawn = checksum(pipe), pipe.plan, draw(pipe)
    assert plan is not None
    with pytest.raises(NotEnoughMemory, match=r"the adapter 'lora' does not fit: with .* of adapters decoding needs"):
        pipe.load_adapter(write_lora(of_rank(64, layers)))
    assert (checksum(pipe), pipe.adapters) == (before, {})
    assert pipe.plan is not None
    assert (pipe.plan.placement, pipe.plan.stages) == (plan.placement, plan.stages)
    assert torch.equal(draw(pipe), drawn)


@dataclass
class Counting:
    """A backend of torch's compiler that runs the graphs as they are, and counts them."""

    graphs: int = 0

    def __call__(self, graph: Any, _: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def test_compiled_blocks_take_any_strength(own_turbo: ZImagePipeline, ink: Path, draw: Draw) -> None:
    """One program for each set of adapters that acts, none for a strength."""
    own_turbo.load_adapter(ink, "ink")
    sets: list[dict[str, float]] = [{"ink": 1.0}, {"ink": 0.5}, {}]
    expected = [draw(own_turbo, adapters=one) for one in sets]
    counting = Counting()
    compile_blocks(own_turbo.transformer, counting)
    graphs = []
    for one, drawn in zip(sets, expected, strict=True):
        assert torch.equal(draw(own_turbo, adapters=one), drawn)
        graphs.append(counting.graphs)
    assert graphs == [1, 1, 2]


def test_recorded_forwards_are_not_used_under_adapters(own_turbo: ZImagePipeline, ink: Path, draw: Draw) -> None:
    """A recording would have the strength fixed in it."""
    from zimage.models.graphs import use_graphs

    recorded = []

    def record(compute: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        result = compute()
        recorded.append(result)
        return (lambda: result.copy_(compute())), result

    own_turbo.load_adapter(ink)
    expected = [draw(own_turbo, adapters={"ink": strength}) for strength in (1.0, 0.5)]
    own_turbo.unload_lora_weights()
    use_graphs(own_turbo.transformer, record, "cpu")
    draw(own_turbo)
    assert len(recorded) == 2
    own_turbo.load_adapter(ink)
    for strength, drawn in zip((1.0, 0.5), expected, strict=True):
        assert torch.equal(draw(own_turbo, adapters={"ink": strength}), drawn)
    assert len(recorded) == 2
