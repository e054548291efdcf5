"""Where a process computes, and what a recipe says of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zimage
from zimage.runtime import choose_device, describe, package_version, portable_path


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda:1"), (True, False, "cuda:1"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_best_device_is_chosen(cuda: bool, mps: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device(None) == torch.device(chosen)
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")


def test_a_card_without_a_number_is_the_one_that_tensors_come_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is where a model is that is there already, also for a thread whose current card is another."""

    def empty(*shape: int, device: torch.device) -> Any:
        return SimpleNamespace(cpu=lambda: None, device=torch.device(device.type, device.index or 0))

    monkeypatch.setattr(torch, "empty", empty)
    assert choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)


def test_a_runtime_is_described_in_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    described = describe(torch.device("cpu"), torch.bfloat16)
    assert described == {
        "zimage": zimage.__version__,
        "torch": torch.__version__,
        "diffusers": package_version("diffusers"),
        "transformers": package_version("transformers"),
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": str(torch.get_num_threads()),
        "weights": "full",
        "activations": "full",
        "attention": "native",
        "blocks": "eager",
        "decode": "whole",
    }
    other = describe(
        torch.device("cpu"), torch.bfloat16, 2, "int8", activations="int8", compiled=True, attention="sage"
    )
    assert (other["decode"], other["weights"], other["activations"]) == ("2 in strips", "int8", "int8")
    assert (other["blocks"], other["attention"]) == ("compiled", "sage")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    on_a_card = describe(torch.device("cuda", 1), torch.float16)
    assert (on_a_card["device"], on_a_card["threads"], on_a_card["dtype"]) == ("Card 1", "", "float16")


def test_what_is_not_installed_has_no_version() -> None:
    assert package_version("torch").startswith(torch.__version__.split("+")[0])
    assert package_version("zimage-of-the-future") == "unknown"


def test_a_path_in_a_recipe_names_no_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert portable_path(tmp_path / "models" / "turbo") == "~/models/turbo"
    assert portable_path(tmp_path.parent / "elsewhere") == str(tmp_path.parent / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert portable_path(Path("turbo")) == "~/turbo"
