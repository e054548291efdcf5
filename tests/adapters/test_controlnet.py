"""A ControlNet is found and loaded from every place that it may be in, and what is none, or damaged, is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageControlNetModel
from safetensors.torch import load_file, save_file
from torch import nn

from zimage import AdapterError, ZImagePipeline
from zimage.adapters.controlnet import ControlNet, find_controlnet
from zimage.testing import build_controlnet

WEIGHTS = "diffusion_pytorch_model.safetensors"
HERE = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_controlnet(tmp_path_factory.mktemp("nets") / "union")


@pytest.fixture(scope="module")
def config(turbo: ZImagePipeline) -> Any:
    return turbo.transformer.config


def load(source: Any, config: Any, **options: Any) -> ControlNet:
    return find_controlnet(source, config, **options).load(torch.float32, HERE, "here")


def same_weights(one: ControlNet, other: Any) -> bool:
    first, second = one.net.state_dict(), other.state_dict()
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("version", "kind", "channels"),
    [("1.0", None, 16), ("2.0", "control_layers", 33), ("2.1", "control_noise_refiner", 33)],
)
def test_folder_and_published_file(version: Any, kind: str | None, channels: int, config: Any, tmp_path: Path) -> None:
    """The file has no config, and is known by its tensors; diffusers reads the folder."""
    theirs = ZImageControlNetModel.from_pretrained(build_controlnet(tmp_path / "net", version=version))
    file = build_controlnet(tmp_path / "Union.safetensors", version=version)
    for source in (tmp_path / "net", file, tmp_path / "net" / WEIGHTS):
        loaded = load(source, config)
        assert loaded.net.add_control_noise_refiner == kind
        assert (loaded.net.control_in_dim, list(loaded.net.control_layers_places)) == (channels, [0, 1])
        assert same_weights(loaded, theirs)
        assert not loaded.net.training
        assert len(loaded.digest) == 64


@pytest.mark.parametrize(("layers", "count", "places"), [
    (30, 6, [0, 5, 10, 15, 20, 25]), (30, 15, list(range(0, 30, 2))), (30, 3, [0, 10, 20]), (2, 1, [0]),
])  # fmt: skip
def test_places_of_published_files(layers: int, count: int, places: list[int], config: Any, tmp_path: Path) -> None:
    tensors = load_file(build_controlnet(tmp_path / "two.safetensors"))
    first = {
        name.partition(".0.")[2]: tensor for name, tensor in tensors.items() if name.startswith("control_layers.0")
    }
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("control_layers.")}
    for number in range(count):
        own = {name: tensor.clone() for name, tensor in first.items() if number == 0 or "before_proj" not in name}
        tensors |= {f"control_layers.{number}.{name}": tensor for name, tensor in own.items()}
    save_file(tensors, tmp_path / "more.safetensors")
    assert list(load(tmp_path / "more.safetensors", {**config, "n_layers": layers}).net.control_layers_places) == places


def test_in_shards_and_in_bfloat16(config: Any, folder: Path, tmp_path: Path) -> None:
    theirs = ZImageControlNetModel.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert same_weights(load(tmp_path / "shards", config), theirs)
    half = find_controlnet(tmp_path / "shards", config).load(torch.bfloat16, HERE, "here")
    assert {tensor.dtype for tensor in half.net.parameters()} == {torch.bfloat16}
    assert half.bytes == sum(tensor.numel() for tensor in theirs.parameters()) * 2


def test_saved_after_use_it_has_parts_of_the_transformer(turbo: ZImagePipeline, folder: Path, tmp_path: Path) -> None:
    theirs = ZImageControlNetModel.from_pretrained(folder)
    used = ZImageControlNetModel.from_transformer(theirs, turbo.transformer)
    used.save_pretrained(tmp_path / "used", safe_serialization=True)
    assert any(name.startswith("t_embedder") for name in load_file(tmp_path / "used" / WEIGHTS))
    assert same_weights(
        load(tmp_path / "used", turbo.transformer.config), ZImageControlNetModel.from_pretrained(folder)
    )


def test_a_name_in_a_folder_and_the_hubs_cache(config: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "several").mkdir()
    for name in ("a", "b"):
        build_controlnet(tmp_path / "several" / f"{name}.safetensors")
    with pytest.raises(AdapterError, match=r"has a.safetensors, b.safetensors; name the file with weight_name"):
        find_controlnet(tmp_path / "several", config)
    assert load(tmp_path / "several", config, weight_name="a.safetensors").bytes
    with pytest.raises(AdapterError, match=r"has no c.safetensors"):
        find_controlnet(tmp_path / "several", config, weight_name="c.safetensors")
    snapshot = tmp_path / "cache" / "models--owner--net" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    shutil.copy(tmp_path / "several" / "a.safetensors", snapshot / "Union.safetensors")
    (tmp_path / "cache" / "models--owner--net" / "refs").mkdir()
    (tmp_path / "cache" / "models--owner--net" / "refs" / "main").write_text("0" * 40)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    for source, more in (("owner/net", {}), ("owner/net/Union.safetensors", {}),
                         ("owner/net", {"weight_name": "Union.safetensors"})):  # fmt: skip
        found = find_controlnet(source, config, **options, **more)
        assert found.place is not None
        assert found.place.hub
        assert found.name == ("owner/net/Union.safetensors" if "Union" in f"{source}{more}" else "owner/net")
        assert found.load(torch.float32, HERE, "here").bytes
    with pytest.raises(AdapterError, match=r"nothing.safetensors of owner/net is not in the cache"):
        find_controlnet("owner/net/nothing.safetensors", config, **options)


def test_diffusers_own_is_shared_and_left_as_it_was(config: Any, folder: Path) -> None:
    theirs = ZImageControlNetModel.from_pretrained(folder)
    loaded = load(theirs, config)
    assert same_weights(loaded, theirs)
    assert loaded.net is not theirs
    pointers = {tensor.data_ptr() for tensor in theirs.parameters()}
    assert {tensor.data_ptr() for tensor in loaded.net.parameters()} == pointers
    half = find_controlnet(theirs, config).load(torch.bfloat16, HERE, "here")
    assert half.net.dtype == torch.bfloat16
    assert theirs.dtype == torch.float32
    assert half.digest == loaded.digest
    with torch.no_grad():
        theirs.control_layers[0].after_proj.weight[0, 0] += 1
    assert load(theirs, config).digest != loaded.digest


Damage = Callable[[dict[str, Any], dict[str, Any]], Any]


def drop(name: str) -> Damage:
    return lambda tensors, config: tensors.pop(name)


def spoil(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensors["control_layers.1.after_proj.bias"][3] = float("nan")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (spoil, "after_proj.bias' has values that are NaN or infinite"),
        (drop("control_layers.0.before_proj.weight"), "1 missing: 'control_layers.0.before_proj.weight'"),
        (lambda tensors, config: tensors.update(other=torch.zeros(3)), "1 unexpected: 'other'"),
        (lambda tensors, config: config.update(_class_name="FluxControlNetModel"), "is of a 'FluxControlNetModel'"),
        (lambda tensors, config: config.update(dim=128), "its dim is 128, the transformer's 64"),
        (lambda tensors, config: config.update(n_heads=8, n_kv_heads=8), "its n_heads is 8, the transformer's 4"),
        (lambda tensors, config: config.update(control_layers_places=[0, 9]), "layer 9, the transformer has 2"),
        (lambda tensors, config: config.update(control_layers_places=[1]), "control_layers_places must be a list"),
        (lambda tensors, config: config.update(control_layers_places=[0, 0]), "ascending layer numbers"),
        (
            lambda tensors, config: config.update(control_refiner_layers_places=[0, 1], n_refiner_layers=1),
            "it has 1 bl",
        ),
        (lambda tensors, config: config.update(control_in_dim=8), "its control_in_dim is 8, latents have 16"),
        (lambda tensors, config: config.update(control_in_dim=16), "1 misshapen: 'control_all_x_embedder.2-1.weight'"),
        (lambda tensors, config: config.update(add_control_noise_refiner="other"), "add_control_noise_refiner must be"),
        (lambda tensors, config: config.update(auto_map={"a": "b"}), "asks for code to be run"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    damage: Damage, said: str, config: Any, folder: Path, tmp_path: Path
) -> None:
    described, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / WEIGHTS)
    damage(tensors, described)
    (tmp_path / "config.json").write_text(json.dumps(described))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=said):
        load(tmp_path, config)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"], "it was made for Flux"),
        (["control_model.input_blocks.0.0.weight"], "it was made for Stable Diffusion"),
        (["down_blocks.0.resnets.0.conv1.weight"], "it was made for Stable Diffusion"),
        (["layers.0.attention.to_q.weight"], "it is no ControlNet for Z-Image"),
        (["control_layers.0.after_proj.weight"], "lacks control_all_x_embedder.2-1.weight"),
    ],
)
def test_other_files_are_refused(keys: list[str], said: str, config: Any, tmp_path: Path) -> None:
    save_file({key: torch.zeros(4, 4) for key in keys}, tmp_path / "net.safetensors")
    with pytest.raises(AdapterError, match=said):
        find_controlnet(tmp_path / "net.safetensors", config)


def test_files_that_are_none(config: Any, folder: Path, tmp_path: Path) -> None:
    whole = build_controlnet(tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:-9])
    (tmp_path / "empty").mkdir()
    (tmp_path / "net.pt").write_bytes(b"pickle")
    for source, said in (
        (tmp_path / "short.safetensors", "is not a whole safetensors file"),
        (tmp_path / "net.pt", "pickles .* are never read"),
        (tmp_path / "empty", "should hold a ControlNet with its config.json, or one file"),
        (tmp_path / "nothing", "is no file or folder that is here"),
        (3, "a ControlNet is a file, a folder, a hub id or diffusers' ZImageControlNetModel, got 3"),
        (nn.Linear(2, 2), "is diffusers' ZImageControlNetModel, got Linear"),
    ):
        with pytest.raises(AdapterError, match=said):
            find_controlnet(source, config)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="so weight_name='a' says nothing"):
        find_controlnet(tmp_path / "net.safetensors", config, weight_name="a")
    with pytest.raises(AdapterError, match="weight_name is about a folder"):
        find_controlnet(ZImageControlNetModel.from_pretrained(folder), config, weight_name="a.safetensors")
    spoiled = ZImageControlNetModel.from_pretrained(folder)
    with torch.no_grad():
        spoiled.control_layers[0].before_proj.weight[0, 0] = float("inf")
    with pytest.raises(AdapterError, match=r"before_proj\.weight has no values, or some that are NaN or infinite"):
        find_controlnet(spoiled, config)


def test_one_for_another_size_of_model_is_refused(config: Any, tmp_path: Path) -> None:
    tensors = load_file(build_controlnet(tmp_path / "net.safetensors"))
    with pytest.raises(AdapterError, match="does not fit this transformer: its dim is 64, the transformer's 128"):
        find_controlnet(tmp_path / "net.safetensors", {**config, "dim": 128})
    extra = {
        name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in tensors.items() if "layers.1" in name
    }
    save_file(tensors | extra, tmp_path / "three.safetensors")
    with pytest.raises(AdapterError, match="has 3 control layers and the transformer 2"):
        find_controlnet(tmp_path / "three.safetensors", config)
