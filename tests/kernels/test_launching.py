"""From which launch on a kernel is started as it was compiled, and what makes it be compiled again.

Stand-ins take the part of Triton and of the card; tests/gpu starts the kernels themselves twice.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage.kernels import launching


class Kernel:
    """Counts what Triton would prepare, and gives something that counts what is started without it."""

    arg_names = ("first", "second", "count", "eps", "width", "rows")

    def __init__(self) -> None:
        self.prepared: list[Any] = []
        self.started: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def prepare(*args: Any, **constants: Any) -> Any:
            self.prepared.append((grid, args, constants))
            return self.Compiled(self)

        return prepare

    class Compiled:
        def __init__(self, kernel: Kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args: self.kernel.started.append((grid, args))


class Card(Tensor):
    """A tensor that says it is on a card, at an address of its own."""

    is_cuda = True
    address = 0

    def data_ptr(self) -> int:
        return self.address


def card(address: int = 1 << 20, dtype: torch.dtype = torch.float32) -> Any:
    made = torch.zeros(4, dtype=dtype).as_subclass(Card)
    made.address = address
    return made


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_ready", {})
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: torch.no_grad())


def blocks(*shape: int, dtype: torch.dtype = torch.int8) -> Any:
    """A tensor that is described as blocks."""
    return SimpleNamespace(base=card(dtype=dtype), block_shape=list(shape))


CONSTANTS: dict[str, Any] = {"rows": 2, "width": 64, "num_warps": 4}


def test_the_second_launch_is_not_prepared() -> None:
    kernel, first, second = Kernel(), card(), card()
    for count in (5, 70, 2**31 - 1):
        launching.launch(kernel, (count,), first, second, count, 1e-5, **CONSTANTS)
    assert kernel.prepared == [((5,), (first, second, 5, 1e-5), {**CONSTANTS, "enable_fp_fusion": False})]
    # The constants in the order of the kernel's parameters, which is not that of the call.
    expected = [((count, 1, 1), (first, second, count, 1e-5, 64, 2)) for count in (70, 2**31 - 1)]
    assert [grid for grid, _ in kernel.started] == [grid for grid, _ in expected]
    for (_, given), (_, wanted) in zip(kernel.started, expected, strict=True):
        assert all(one is other or one == other for one, other in zip(given, wanted, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"first": card(dtype=torch.float16)}, {"first": card(address=(1 << 20) + 8)}, {"second": None},
        {"second": card(dtype=torch.int8)}, {"second": card(address=(1 << 20) + 4)}, {"count": 2**31}, {"eps": None},
        {"rows": 4}, {"num_warps": 8}, {"width": 32}, {"second": blocks(64, 128)},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_compiled_for_is_prepared_again(change: dict[str, Any]) -> None:
    kernel = Kernel()
    for given in ({}, change, {}, change):
        named = {"first": card(), "second": card(), "count": 5, "eps": 1e-5, **CONSTANTS, **given}
        launching.launch(kernel, (1, 2), *(named.pop(name) for name in ("first", "second", "count", "eps")), **named)
    assert len(kernel.prepared) == len(kernel.started) == 2


def test_blocks_are_told_apart() -> None:
    kernel = Kernel()
    for second in 2 * [blocks(64, 128), blocks(128, 64), blocks(64, 128, dtype=torch.float16)]:
        launching.launch(kernel, (1,), card(), second, 5, 1e-5, **CONSTANTS)
    assert (len(kernel.prepared), len(kernel.started)) == (3, 3)


def test_another_kernel_and_another_card_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernel(), Kernel()
    for kernel in kernels:
        launching.launch(kernel, (1,), card(), None, 5, 1e-5, **CONSTANTS)
    assert [len(kernel.prepared) for kernel in kernels] == [1, 1]
    other = card()
    monkeypatch.setattr(Card, "device", property(lambda self: "cuda:1" if self is other else "cuda:0"))
    for first in (card(), other, card(), other):
        launching.launch(kernels[0], (1,), first, None, 5, 1e-5, **CONSTANTS)
    assert len(kernels[0].prepared) == 1 + 2


def test_an_interpreter_gets_every_launch() -> None:
    kernel, first = Kernel(), torch.zeros(4)
    for _ in range(2):
        launching.launch(kernel, (3,), first, None, 5, 1e-5, **CONSTANTS)
    assert [grid for grid, *_ in kernel.prepared] == [(3,), (3,)]
    assert launching._ready == {}


def test_an_older_triton_gets_no_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_TAKES_CONSTANTS", False)
    kernel = Kernel()
    for _ in range(2):
        launching.launch(kernel, (1,), card(), None, 5, 1e-5, **CONSTANTS)
    assert kernel.started[0][1][1:] == (None, 5, 1e-5)
