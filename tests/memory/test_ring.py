"""The ring: the right weights at each moment whatever the order, even if copies come late, and no allocation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zimage.memory.copiers import HostCopier
from zimage.memory.meter import AllocationMeter
from zimage.memory.ring import ALIGNMENT, Layer, Ring, layout
from zimage.models.precision import Float32Math


class LateCopier:
    """A device that copies as late as it may: when it is waited for. It notes what it was asked, in order.

    A place that is filled before what was computed with it is done (`free` older than its last use) is an error.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.marks = 0

    def start(self, place: Tensor, source: Tensor, free: int | None) -> Any:
        self.asked.append(("start", int(source[0])))
        return place, source, free

    def wait(self, ticket: Any) -> None:
        place, source, _ = ticket
        self.asked.append(("wait", int(source[0])))
        place.copy_(source)

    def mark(self) -> int:
        self.marks += 1
        return self.marks


def make(count: int) -> tuple[list[nn.Module], list[Layer]]:
    """Linear layers with distinct weights, as layers whose bytes are on the host."""
    modules: list[nn.Module] = []
    layers = []
    for number in range(count):
        module = nn.Linear(3, 5).requires_grad_(False)
        nn.init.constant_(module.weight, number)
        nn.init.constant_(module.bias, 100 + number)
        fields, size = layout(module)
        source = torch.zeros(size, dtype=torch.uint8)
        for field in fields:
            field.view(source).copy_(getattr(field.owner, field.name))
        modules.append(module)
        layers.append(Layer(module, fields, size, source))
    return modules, layers


def visit(ring: Ring, modules: Sequence[nn.Module], order: Sequence[int]) -> None:
    for number in order:
        module = modules[number]
        with ring.hold(module):
            assert torch.equal(module.weight, torch.full((5, 3), float(number)))  # type: ignore[arg-type]
            assert torch.equal(module.bias, torch.full((5,), 100.0 + number))  # type: ignore[arg-type]


def test_the_layout_is_aligned_and_covers_every_parameter() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 2, bias=False)))
    fields, size = layout(module)
    assert [field.path for field in fields] == ["0.weight", "0.bias", "1.0.weight"]
    assert all(field.offset % ALIGNMENT == 0 for field in fields)
    assert size == fields[-1].offset + 10 * 4
    assert [name for name, _ in module.named_parameters()] == [field.path for field in fields]


def test_modulations_stay() -> None:
    block = nn.ModuleDict({"w1": nn.Linear(2, 2), "adaLN_modulation": nn.Sequential(nn.Linear(2, 8))})
    assert [field.path for field in layout(block)[0]] == ["w1.weight", "w1.bias"]


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize(
    "order",
    [
        [0, 1, 2, 3, 4] * 3,
        [0, 1, 2, 3, 4, 2, 3, 4] * 3,  # with guidance: the other branch begins after the refiners
        [4, 0, 3, 3, 1, 2, 0, 4, 1],
    ],
)
def test_each_layer_has_its_own_weights_while_it_runs(slots: int, order: list[int]) -> None:
    for copier in (LateCopier(), HostCopier()):
        modules, layers = make(5)
        visit(Ring(layers, slots, torch.device("cpu"), copier), modules, order)


def test_the_next_is_on_its_way_while_one_computes() -> None:
    modules, layers = make(4)
    for number, layer in enumerate(layers):
        layer.source[0] = number  # a name for the notes; the first weight is not looked at here
    copier = LateCopier()
    ring = Ring(layers, 2, torch.device("cpu"), copier)
    for module in modules * 2:
        with ring.hold(module):
            pass
    starts = [number for kind, number in copier.asked if kind == "start"]
    assert starts == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    for now in range(8):  # when one is waited for, the next has not been; when it ends, the next is on its way
        assert copier.asked.index(("start", now % 4)) <= copier.asked.index(("wait", now % 4))
    assert copier.asked[:4] == [("start", 0), ("wait", 0), ("start", 1), ("wait", 1)]


def test_an_order_is_learned() -> None:
    modules, layers = make(4)
    copier = LateCopier()
    ring = Ring(layers, 2, torch.device("cpu"), copier)
    visit(ring, modules, [3, 1, 3, 1, 3])
    started = len([kind for kind, _ in copier.asked if kind == "start"])
    visit(ring, modules, [1, 3, 1, 3])
    assert len([kind for kind, _ in copier.asked if kind == "start"]) == started


def test_a_place_is_free_only_after_what_was_computed_with_it() -> None:
    """Each fill is told the mark that was set when the layer before it in that place was left; the first one, when the
    place was made, of memory that others may still have been computing with."""
    modules, layers = make(3)
    frees: dict[int, list[int | None]] = {}

    class Noting(LateCopier):
        def start(self, place: Tensor, source: Tensor, free: int | None) -> Any:
            frees.setdefault(place.data_ptr(), []).append(free)
            return super().start(place, source, free)

    visit(Ring(layers, 2, torch.device("cpu"), Noting()), modules, [0, 1, 2, 0])
    one, other = frees.values()
    assert one == [1, 3, 5]
    assert other == [2, 4]


def test_nothing_is_left_on_the_modules_and_nothing_allocated() -> None:
    modules, layers = make(3)
    before = [dict(module.named_parameters()) for module in modules]
    ring = Ring(layers, 2, torch.device("cpu"), LateCopier())
    with AllocationMeter() as meter:
        for module in modules * 3:
            with ring.hold(module):
                pass
    assert meter.allocations == 0
    for module, parameters in zip(modules, before, strict=True):
        assert all(getattr(module, name) is parameter for name, parameter in parameters.items())


def test_an_error_while_a_layer_computes_leaves_it_as_it_was() -> None:
    modules, layers = make(3)
    ring = Ring(layers, 2, torch.device("cpu"), HostCopier())
    weight = modules[1].weight
    with pytest.raises(KeyError), ring.hold(modules[1]):
        raise KeyError
    assert modules[1].weight is weight
    visit(ring, modules, [0, 1, 2])


def test_a_source_that_fails_is_tried_again_when_it_is_needed() -> None:
    modules, layers = make(2)
    whole, broken = layers[1].source, True

    def source(buffer: Tensor) -> None:
        if broken:
            raise OSError("gone")
        buffer.copy_(whole)

    layers[1] = Layer(layers[1].module, layers[1].fields, layers[1].size, source)
    ring = Ring(layers, 2, torch.device("cpu"), HostCopier())
    visit(ring, modules, [0])  # fetches the broken one, which nobody needs yet
    with pytest.raises(OSError, match="gone"):
        visit(ring, modules, [1])
    broken = False
    visit(ring, modules, [0, 1, 0])


def test_places_that_were_made_in_inference_mode_are_filled_outside_of_it() -> None:
    """A copier's thread never is in that mode, and whoever asks for the next picture need not be."""
    for copier in (LateCopier(), HostCopier()):
        modules, layers = make(3)
        with torch.inference_mode():
            ring = Ring(layers, 2, torch.device("cpu"), copier)
            visit(ring, modules, [0, 1, 2])
        visit(ring, modules, [0, 1, 2])


def test_other_modules_pass() -> None:
    modules, layers = make(2)
    ring = Ring(layers[:1], 2, torch.device("cpu"), LateCopier())
    with ring.hold(modules[1]):
        assert float(modules[1].bias[0]) == 101  # type: ignore[index, arg-type]


def test_a_second_try_in_float32_sees_views_and_no_copies() -> None:
    module = nn.Linear(3, 5, dtype=torch.bfloat16).requires_grad_(False)
    fields, size = layout(module)
    ring = Ring(
        [Layer(module, fields, size, torch.zeros(size, dtype=torch.uint8))], 1, torch.device("cpu"), LateCopier()
    )
    with Float32Math(), ring.hold(module):
        weight = module._parameters["weight"]
        assert weight is not None
        assert weight.dtype == torch.bfloat16
        assert weight.data_ptr() == ring._places[0].buffer.data_ptr()
