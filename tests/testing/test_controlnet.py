"""Random ControlNets are what diffusers loads, and their values follow from what was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageControlNetModel
from safetensors.torch import load_file

from zimage.testing import build_controlnet


@pytest.mark.parametrize("version", ["1.0", "2.0", "2.1"])
def test_diffusers_loads_it(version: Any, tmp_path: Path) -> None:
    folder = build_controlnet(tmp_path / "net", version=version)
    net = ZImageControlNetModel.from_pretrained(folder)
    file = load_file(build_controlnet(tmp_path / "net.safetensors", version=version))
    state = net.state_dict()
    assert all(torch.equal(file[name], tensor) for name, tensor in state.items())
    assert min(float(tensor.std()) for name, tensor in state.items() if name.endswith("_proj.weight")) > 0.05
    spare = {name: tensor for name, tensor in file.items() if name not in state}
    assert bool(spare) == (version == "2.0")
    assert not any(tensor.any() for name, tensor in spare.items() if "_proj." in name)
    assert all(name.startswith("control_noise_refiner.") for name in spare)


def test_values_follow_from_the_seed(tmp_path: Path) -> None:
    one, two, three = (
        load_file(build_controlnet(tmp_path / f"{name}.safetensors", **options))  # type: ignore[arg-type]
        for name, options in (("a", {}), ("b", {"dtype": "bfloat16"}), ("c", {"seed": 1}))
    )
    assert all(torch.equal(tensor.bfloat16(), two[name]) for name, tensor in one.items())
    assert not any(torch.equal(tensor, three[name]) for name, tensor in one.items())


def test_what_there_is_not_is_refused(tmp_path: Path) -> None:
    for options in ({"size": "huge"}, {"version": "3.0"}):
        with pytest.raises(ValueError, match="size must be one of tiny, small, wide, real and version"):
            build_controlnet(tmp_path / "net", **options)
