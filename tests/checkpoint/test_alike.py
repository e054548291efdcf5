"""Two checkpoints' text encoders and VAEs: the same in whatever files, and other where values or settings are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage.checkpoint.alike import difference
from zimage.checkpoint.survey import Survey, survey
from zimage.testing import build_checkpoint

from .writers import float8, llama, weights_of, write_gguf

COMPONENTS = ("text_encoder", "vae")


def found(folder: Path) -> Survey:
    surveyed = survey(folder)
    surveyed.require()
    return surveyed


@pytest.fixture
def copied(turbo_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(turbo_folder, tmp_path / "copy")


@pytest.mark.parametrize("component", COMPONENTS)
def test_files_names_and_types_do_not_count(base_folder: Path, tmp_path: Path, component: str) -> None:
    other = build_checkpoint(tmp_path / "model", dtype="bfloat16", max_shard_size="200KB", text_encoder_prefix="")
    assert len(list((other / "text_encoder").glob("*.safetensors"))) > 1
    assert difference(found(base_folder), found(other), component) == ""


@pytest.mark.parametrize("component", COMPONENTS)
def test_other_weights_are_told(base_folder: Path, tmp_path: Path, component: str) -> None:
    other = build_checkpoint(tmp_path / "model", seed=1)
    assert difference(found(base_folder), found(other), component).startswith("the values of ")


def test_one_changed_tensor_is_told(base_folder: Path, copied: Path) -> None:
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"] = tensors["decoder.conv_in.bias"] + 1
    save_file(tensors, file)
    assert difference(found(base_folder), found(copied), "vae") == "the values of decoder.conv_in.bias differ"
    assert difference(found(base_folder), found(copied), "text_encoder") == ""


def test_one_changed_setting_is_told(base_folder: Path, copied: Path) -> None:
    file = copied / "vae" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "shift_factor": 0.25}))
    assert difference(found(base_folder), found(copied), "vae") == f"shift_factor is {config['shift_factor']} and 0.25"


def test_fewer_bits_are_compared_with_the_same_and_not_with_others(base_folder: Path, tmp_path: Path) -> None:
    """Norms, which have all their bits, are compared with any."""
    weights = weights_of(base_folder, "text_encoder")
    name = "layers.0.mlp.down_proj.weight"
    other = {**weights, f"model.{name}": weights[f"model.{name}"].flip(0)}
    norm = {**weights, "model.layers.0.input_layernorm.weight": weights["model.layers.0.input_layernorm.weight"] + 1}
    files = {}
    for called, values in {"same": weights, "again": weights, "other": other, "norm": norm}.items():
        files[called] = write_gguf(tmp_path / f"{called}.gguf", llama(values), lambda name: "Q8_0", "qwen3")
    scaled = tmp_path / "scaled.safetensors"
    save_file(float8(weights, lambda name: "mlp" in name), scaled)
    surveys = {called: survey(base_folder, {"text_encoder": file}) for called, file in {**files, "fp8": scaled}.items()}
    for one in surveys.values():
        one.require()
    surveys["folder"] = found(base_folder)

    def said(one: str, two: str) -> str:
        return difference(surveys[one], surveys[two], "text_encoder")

    assert said("same", "again") == said("same", "folder") == said("fp8", "folder") == said("fp8", "same") == ""
    assert said("same", "other") == f"the values of {name} differ"
    assert said("other", "folder") == ""
    assert said("norm", "folder") == said("fp8", "norm") == "the values of layers.0.input_layernorm.weight differ"


def test_values_beyond_the_sample_are_not_seen(base_folder: Path, copied: Path) -> None:
    """What the module says of itself."""
    file = copied / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    changed = tensors[name].clone()
    changed[-1, -1] += 1
    save_file({**tensors, name: changed}, file)
    assert difference(found(base_folder), found(copied), "text_encoder") == ""
    save_file({**tensors, name: torch.zeros_like(changed)}, file)
    assert difference(found(base_folder), found(copied), "text_encoder") == "the values of embed_tokens.weight differ"
