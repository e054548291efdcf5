"""The switch: when kernels are asked for, when torch computes instead, and which failures are handed on."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor

from zimage import RequestError
from zimage.errors import ZImageWarning
from zimage.kernels import fused, switch
from zimage.kernels.switch import run, using, wanted
from zimage.models.layers import normalize

HIDDEN, WEIGHT = torch.ones(1, 2, 8), torch.ones(8)


@pytest.fixture(autouse=True)
def no_failures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.setattr(switch, "_failures", [])
    return switch._failures


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], list[int]]:
    """Lets the kernel `normalize` raise; gives the calls of it."""

    def install(error: BaseException) -> list[int]:
        calls: list[int] = []

        def fail(*args: Any) -> Tensor:
            calls.append(1)
            raise error

        monkeypatch.setattr(fused, "normalize", fail)
        return calls

    return install


def loaded_again() -> ModuleType:
    """The module as a new process has it."""
    spec = util.spec_from_file_location("zimage.kernels.switch_again", switch.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_by_default_only_what_is_on_cuda_is_for_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wanted(HIDDEN)
    with using("on"):
        assert wanted(HIDDEN)
        with using("off"):
            assert not wanted(HIDDEN)
        assert wanted(HIDDEN)
    assert not wanted(HIDDEN)
    on_card: Any = SimpleNamespace(is_cuda=True)
    assert wanted(on_card)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not wanted(on_card)


def test_a_thread_decides_for_itself() -> None:
    with using("on"), ThreadPoolExecutor(1) as pool:
        assert not pool.submit(wanted, HIDDEN).result()


def test_a_compiler_sees_the_plain_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with using("on"):
        assert not wanted(HIDDEN)


@pytest.mark.parametrize(("value", "mode"), [("off", "off"), ("on", "on"), ("", "auto"), (None, "auto")])
def test_the_environment(monkeypatch: pytest.MonkeyPatch, device: torch.device, value: str | None, mode: str) -> None:
    if value is None:
        monkeypatch.delenv(switch.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(switch.VARIABLE, value)
    again = loaded_again()
    assert again._mode.get() == mode
    ran = again.run("normalize", HIDDEN.to(device), WEIGHT.to(device), None, 1e-5) if mode != "auto" else None
    assert (ran is not None) == (mode == "on")


def test_a_mode_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(RequestError, match="the mode of the kernels must be one of auto, off, on, got 'no'"),
        using("no"),
    ):
        pass
    monkeypatch.setenv(switch.VARIABLE, "no")
    with pytest.raises(RequestError, match="ZIMAGE_KERNELS must be one of auto, off, on, got 'no'"):
        loaded_again()


def test_off_runs_nothing(failing: Callable[[BaseException], list[int]]) -> None:
    calls = failing(ValueError("x"))
    with using("off"):
        assert run("normalize", HIDDEN, WEIGHT, None, 1e-5) is None
    assert calls == []


def test_what_fails_is_left_once_and_for_all(
    failing: Callable[[BaseException], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing(RuntimeError("no C compiler\nfound"))
    with pytest.warns(ZImageWarning, match=r"torch computes without them: RuntimeError: no C compiler \(") as caught:
        assert run("normalize", HIDDEN, WEIGHT, None, 1e-5) is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("normalize", HIDDEN, WEIGHT, None, 1e-5) is None
        assert run("gate", HIDDEN, HIDDEN, 1.0, False) is None
        switch._give_up("again")
    assert calls == [1]


def test_triton_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zimage.kernels.fused", "zimage.kernels.rows"):
        monkeypatch.delitem(sys.modules, name)
    for name in ("fused", "rows"):
        monkeypatch.delattr(f"zimage.kernels.{name}")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(ZImageWarning, match="ModuleNotFoundError: import of triton halted"):
        assert run("normalize", HIDDEN, WEIGHT, None, 1e-5) is None


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("x"), RuntimeError("Triton Error [CUDA]: out of memory"), KeyboardInterrupt()],
    ids=["torch", "triton", "interrupt"],
)
def test_memory_that_runs_out_is_no_failure_of_a_kernel(
    failing: Callable[[BaseException], list[int]], error: BaseException
) -> None:
    failing(error)
    with pytest.raises(type(error)):
        run("normalize", HIDDEN, WEIGHT, None, 1e-5)
    assert switch._failures == []


def test_on_hands_every_failure_on(failing: Callable[[BaseException], list[int]]) -> None:
    calls = failing(ValueError("x"))
    switch._failures.append("earlier")
    with using("on"), pytest.raises(ValueError, match="x"):
        run("normalize", HIDDEN, WEIGHT, None, 1e-5)
    assert calls == [1]


def test_gradients_need_the_plain_expression(failing: Callable[[BaseException], list[int]]) -> None:
    calls = failing(ValueError("x"))
    weight = torch.nn.Parameter(WEIGHT)
    with using("on"), torch.enable_grad():
        assert run("normalize", HIDDEN, weight, None, 1e-5) is None
        assert run("normalize", HIDDEN.clone().requires_grad_(True), WEIGHT, None, 1e-5) is None
        assert calls == []
        with torch.no_grad(), pytest.raises(ValueError, match="x"):
            run("normalize", HIDDEN, weight, None, 1e-5)


def test_other_tensors_need_the_plain_expression(failing: Callable[[BaseException], list[int]]) -> None:
    class Other(Tensor):
        pass

    calls = failing(ValueError("x"))
    with using("on"):
        assert run("normalize", HIDDEN.as_subclass(Other), WEIGHT, None, 1e-5) is None
    assert calls == []


def test_a_kernel_that_does_not_apply_is_no_failure() -> None:
    layer = RMSNorm(8, eps=1e-5).double()
    hidden = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).double()
    expected = normalize(layer, hidden)
    with using("on"):
        assert run("normalize", hidden, layer.weight, None, 1e-5) is None
        assert torch.equal(normalize(layer, hidden), expected)
    assert switch._failures == []


def test_nothing_is_loaded_before_it_is_needed(run_python: Callable[..., str]) -> None:
    code = """
import sys
import zimage
print([name for name in ("torch", "triton") if name in sys.modules])
import torch
from diffusers.models.normalization import RMSNorm
from zimage.models.layers import normalize
normalize(RMSNorm(8, eps=1e-5), torch.ones(2, 8))
print([name for name in sys.modules if name.startswith("zimage.kernels.")])
"""
    assert run_python(code).splitlines() == ["[]", "['zimage.kernels.switch']"]


@pytest.mark.parametrize(
    ("mode", "device", "expected"),
    [("auto", "cuda", True), ("auto", "cpu", False), ("off", "cuda", False), ("on", "cpu", True)],
)
def test_where_they_are_used(mode: str, device: str, expected: bool) -> None:
    with using(mode):
        assert switch.used(torch.device(device)) is expected


def test_what_failed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "_failures", ["no C compiler"])
    with using("auto"):
        assert not switch.used(torch.device("cuda"))
    with using("on"):
        assert switch.used(torch.device("cuda"))
