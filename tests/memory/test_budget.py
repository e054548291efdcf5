"""What this machine has: of a card what is free and ours already, of the host what a container allows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from zimage import RequestError
from zimage.memory import budget, ladder
from zimage.memory.plan import Budget

GIB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """20 GiB of free host memory, no container; a card of 16 GiB, of which 9 are free and 1 is reserved by torch."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(budget, "_CGROUP", tmp_path)
    return tmp_path


def test_a_card(machine: Path) -> None:
    card = torch.device("cuda")
    assert budget.find_budget("auto", card) == Budget(device=9 * GIB, host=18 * GIB, name="auto")
    assert budget.find_budget("8GiB", card) == Budget(device=7 * GIB, host=18 * GIB, name="8GiB")
    assert budget.find_budget("12GiB", card).device == 9 * GIB


def test_what_another_model_holds_is_not_free(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But what garbage held is, on the host too, and for a model that is there already what tensors hold is its own."""
    held, card = {"model": 4 * GIB, "garbage": GIB // 2}, torch.device("cuda")
    waiting = {"garbage": 10 * GIB}
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: sum(held.values()))
    monkeypatch.setattr(budget, "release", lambda: [memory.pop("garbage", None) for memory in (held, waiting)])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20 * GIB - sum(waiting.values())))
    found = budget.find_budget("auto", card)
    assert found.device == 9 * GIB  # of 9 that are free and 1 that torch keeps, less 1
    assert found.host == 18 * GIB
    assert budget.find_budget("12GiB", card).device == 9 * GIB
    assert budget.find_budget("20GiB", card, loaded=True).device == pytest.approx(0.9 * 14 * GIB)


def test_torch_gives_back_what_it_keeps_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its build has a name for that: page-locked memory it would keep for as long as the process lives."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("device"))
    monkeypatch.delattr(torch._C, "_host_emptyCache", raising=False)
    ladder.release()
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: done.append("host"), raising=False)
    ladder.release()
    assert done == ["device", "device", "host"]


def test_a_device_that_is_the_host(machine: Path) -> None:
    assert budget.find_budget("auto", torch.device("cpu")) == Budget(device=18 * GIB, host=None, name="auto")
    assert budget.find_budget("10GiB", torch.device("cpu")).device == 9 * GIB
    assert budget.find_budget("30GiB", torch.device("cpu")).device == 18 * GIB


def test_a_container_has_less(machine: Path) -> None:
    """What the system keeps of files is free there too, such as a checkpoint that was read."""
    (machine / "memory.max").write_text("max\n")
    (machine / "memory.current").write_text(f"{GIB + 3 * GIB // 4}\n")
    kept = f"anon {GIB}\nfile {3 * GIB // 4}\nactive_file {GIB // 4}\ninactive_file {GIB // 2}\nshmem 0\n"
    (machine / "memory.stat").write_text(kept)
    assert budget.free_host_memory() == 20 * GIB
    (machine / "memory.max").write_text(f"{4 * GIB}\n")
    assert budget.free_host_memory() == 3 * GIB
    (machine / "memory.max").write_text(f"{GIB // 2}\n")
    assert budget.free_host_memory() == 0


def test_what_is_no_amount(machine: Path) -> None:
    with pytest.raises(RequestError, match="memory must be 'auto' or an amount"):
        budget.find_budget("much", torch.device("cpu"))
