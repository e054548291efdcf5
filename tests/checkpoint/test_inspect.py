from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage.checkpoint.inspect import Inspection, Shard, fingerprint, inspect_checkpoint
from zimage.checkpoint.load import load_components
from zimage.errors import CheckpointError
from zimage.testing import build_checkpoint, checkpoint_parameters

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def by_name(inspection: Inspection) -> dict[str, object]:
    return {component.name: component for component in inspection.components}


def test_a_whole_checkpoint(tiny: Path) -> None:
    found = inspect_checkpoint(tiny)
    assert found.problems == ()
    assert (found.variant, found.variant_reason, found.shift) == ("turbo", None, 3.0)
    assert found.folder == str(tiny)
    assert found.fingerprint == fingerprint(tiny)
    parameters = checkpoint_parameters("tiny")
    assert {component.name: component.parameters for component in found.components} == parameters
    for component in found.components:
        file = next((tiny / component.name).glob("*.safetensors"))
        assert component.shards == (Shard(name=file.name, bytes=file.stat().st_size),)
        assert component.bytes == file.stat().st_size
        assert component.dtypes == ("F32",)
    classes = {component.name: component.class_name for component in found.components}
    assert classes == {
        "text_encoder": "Qwen3Model",
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
    }


def test_loaded_parameters_are_those_in_memory(tiny: Path) -> None:
    components = load_components(tiny, dtype=torch.float32)
    for component in inspect_checkpoint(tiny).components:
        held = sum(tensor.numel() for tensor in getattr(components, component.name).state_dict().values())
        assert component.loaded_parameters == held
        assert (component.loaded_parameters < component.parameters) == (component.name == "text_encoder")


def test_shards_and_mixed_types(tmp_path: Path) -> None:
    folder = build_checkpoint(
        tmp_path / "sharded", variant="base", dtype="bfloat16", transformer_dtype="float32", max_shard_size="1MB"
    )
    found = inspect_checkpoint(folder)
    text_encoder, transformer, vae = found.components
    assert found.variant == "base"
    assert (text_encoder.dtypes, transformer.dtypes, vae.dtypes) == (("BF16",), ("F32",), ("BF16",))
    assert len(transformer.shards) > 1
    assert sum(shard.bytes for shard in transformer.shards) == transformer.bytes
    assert transformer.parameters == checkpoint_parameters("tiny")["transformer"]


def test_it_goes_through_json(tiny: Path) -> None:
    told = json.loads(json.dumps(inspect_checkpoint(tiny).to_dict()))
    assert told["components"][1]["name"] == "transformer"
    assert told["components"][1]["shards"][0]["bytes"] == (tiny / TRANSFORMER).stat().st_size
    assert told["problems"] == []


def test_all_problems_are_told_and_the_same_that_loading_raises(copy: Path) -> None:
    tensors = load_file(copy / TRANSFORMER)
    del tensors["x_pad_token"]
    save_file(tensors, copy / TRANSFORMER)
    (copy / "vae" / "config.json").unlink()
    (copy / "tokenizer" / "tokenizer_config.json").write_text("{")
    (copy / "text_encoder" / "model.safetensors").write_bytes(b"")
    problems = inspect_checkpoint(copy).problems
    assert len(problems) == 4
    for problem, said in zip(
        problems,
        ("vae/config.json is missing", "model.safetensors", "x_pad_token", "tokenizer_config.json"),
        strict=True,
    ):
        assert said in problem
    with pytest.raises(CheckpointError) as caught:
        load_components(copy, dtype=torch.float32)
    assert all(problem in str(caught.value) for problem in problems[:3])
    assert "and 1 more problem" in str(caught.value)
    assert str(caught.value.__cause__) == problems[0]


def test_one_problem_is_raised_as_it_is_told(copy: Path) -> None:
    (copy / "vae" / "config.json").unlink()
    (problem,) = inspect_checkpoint(copy).problems
    with pytest.raises(CheckpointError) as caught:
        load_components(copy, dtype=torch.float32)
    assert str(caught.value) == problem


def test_a_variant_that_cannot_be_told(copy: Path) -> None:
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift": 4.5}))
    found = inspect_checkpoint(copy)
    assert (found.variant, found.shift, found.problems) == (None, 4.5, ())
    assert "shift 4.5" in str(found.variant_reason)
    assert inspect_checkpoint(copy, hub_id="Tongyi-MAI/Z-Image").variant == "base"


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone is missing"):
        inspect_checkpoint(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"gone/text_encoder is missing"):
        fingerprint(tmp_path / "gone")


def test_fingerprints_tell_weights_apart_and_nothing_else(tiny: Path, copy: Path, tmp_path: Path) -> None:
    first = fingerprint(tiny)
    assert len(first) == 32
    assert set(first) <= set("0123456789abcdef")
    (copy / "README.md").write_text("moved")
    (copy / "transformer" / "config.json").write_text("{}")
    assert fingerprint(copy) == first
    assert fingerprint(build_checkpoint(tmp_path / "base", variant="base")) == first  # the same weights
    assert fingerprint(build_checkpoint(tmp_path / "other", seed=1)) != first
    assert fingerprint(build_checkpoint(tmp_path / "half", dtype="bfloat16")) != first
    assert fingerprint(build_checkpoint(tmp_path / "shards", max_shard_size="1MB")) != first


def test_a_file_of_its_own_may_be_called_otherwise(tiny: Path, tmp_path: Path) -> None:
    own = tiny / "transformer" / "diffusion_pytorch_model.safetensors"
    first, second, other = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "other"))
    for copy in (first, second, other):
        shutil.copyfile(own, copy)
    with other.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert fingerprint(tiny, {"transformer": first}) == fingerprint(tiny, {"transformer": second})
    assert fingerprint(tiny, {"transformer": first}) != fingerprint(tiny, {"transformer": other})


def test_a_fingerprint_sees_each_component_and_a_changed_header(tiny: Path, tmp_path: Path) -> None:
    seen = {fingerprint(tiny)}
    for number, file in enumerate(sorted(tiny.rglob("*.safetensors"))):
        folder = Path(shutil.copytree(tiny, tmp_path / str(number)))
        target = folder / file.relative_to(tiny)
        tensors = load_file(target)
        first = next(iter(tensors))
        save_file(tensors, target, metadata={"format": "pt", "note": "x"})
        seen.add(fingerprint(folder))
        tensors[first] = tensors[first].clone()
        tensors = {name: tensor + 1e-3 for name, tensor in tensors.items()}
        save_file(tensors, target)
        seen.add(fingerprint(folder))
    assert len(seen) == 7


def test_a_fingerprint_sees_names_that_change_places(tiny: Path, copy: Path) -> None:
    content = (copy / TRANSFORMER).read_bytes()
    for old, new in ((b"noise_refiner.0", b"noise_refiner.@"), (b"noise_refiner.1", b"noise_refiner.0")):
        content = content.replace(old, new)
    (copy / TRANSFORMER).write_bytes(content.replace(b"noise_refiner.@", b"noise_refiner.1"))
    assert inspect_checkpoint(copy).problems == ()
    assert fingerprint(copy) != fingerprint(tiny)
