from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from zimage.checkpoint.inspect import inspect_checkpoint
from zimage.checkpoint.load import Components, load_components
from zimage.checkpoint.save import save_components
from zimage.errors import CheckpointError, RequestError
from zimage.testing import build_checkpoint

PARTS = ("transformer", "text_encoder", "vae")


def same(one: Components, other: Components) -> bool:
    for part in PARTS:
        expected = getattr(other, part).state_dict()
        found = getattr(one, part).state_dict()
        if list(found) != list(expected) or not all(torch.equal(found[name], expected[name]) for name in found):
            return False
    return True


@pytest.fixture
def turbo(tiny: Path) -> Components:
    return load_components(tiny, dtype=torch.float32)


@pytest.mark.parametrize("max_shard_size", ["5GB", "1MB", 400_000])
def test_what_is_saved_loads_again_bit_for_bit(max_shard_size: Any, turbo: Components, tmp_path: Path) -> None:
    folder = save_components(turbo, tmp_path / "saved", max_shard_size=max_shard_size)
    assert same(load_components(folder, dtype=torch.float32), turbo)
    assert (len(list((folder / "transformer").glob("*.safetensors"))) > 1) == (max_shard_size != "5GB")
    assert inspect_checkpoint(folder).problems == ()
    assert inspect_checkpoint(folder).variant == "turbo"
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "ZImageTransformer2DModel"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("keeps_source", [True, False])
def test_diffusers_loads_what_is_saved(keeps_source: bool, turbo: Components, tmp_path: Path) -> None:
    from diffusers import ZImagePipeline

    components = turbo if keeps_source else dataclasses.replace(turbo, folder=None)
    folder = save_components(components, tmp_path / "saved", max_shard_size="1MB")
    theirs = ZImagePipeline.from_pretrained(folder, local_files_only=True)
    assert theirs.scheduler.config.shift == 3.0
    assert not theirs.scheduler.config.use_dynamic_shifting
    for part in PARTS:
        expected = getattr(theirs, part).state_dict()
        assert all(torch.equal(expected[name], tensor) for name, tensor in getattr(turbo, part).state_dict().items())
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        features = theirs.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(features, turbo.text_encoder(ids).last_hidden_state)
    text = "<|im_start|>user\na fox 狐狸<|im_end|>\n"
    assert theirs.tokenizer(text)["input_ids"] == turbo.tokenizer(text)["input_ids"]


def test_the_text_encoder_is_copied_whole_and_as_it_is(tmp_path: Path) -> None:
    source = build_checkpoint(tmp_path / "source", max_shard_size="200KB")
    for part in ("text_encoder", "tokenizer"):
        (source / part / "modeling.py").write_text("raise SystemExit")
        (source / part / "pytorch_model.bin").write_bytes(b"pickle")
    components = load_components(source, dtype=torch.bfloat16)
    folder = save_components(components, tmp_path / "saved")
    for part in ("text_encoder", "tokenizer"):
        copied = {path.name: path.read_bytes() for path in (folder / part).iterdir()}
        known = {path.name: path.read_bytes() for path in (source / part).iterdir()}
        del known["modeling.py"], known["pytorch_model.bin"]
        assert copied == known
    saved = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert same(load_components(folder, dtype=torch.bfloat16), components)


def test_links_become_files(turbo: Components, tiny: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    for path in tiny.rglob("*.*"):
        (linked / path.relative_to(tiny)).parent.mkdir(parents=True, exist_ok=True)
        (linked / path.relative_to(tiny)).symlink_to(path)
    folder = save_components(dataclasses.replace(turbo, folder=linked), tmp_path / "saved")
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    assert same(load_components(folder, dtype=torch.float32), turbo)


def test_without_a_source_the_layers_that_are_held_are_written(turbo: Components, tmp_path: Path) -> None:
    folder = save_components(dataclasses.replace(turbo, folder=None), tmp_path / "saved")
    again = load_components(folder, dtype=torch.float32)
    assert same(again, turbo)
    assert again.text_encoder_layers == turbo.text_encoder_layers == 3
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert again.text_encoder.config.to_dict() == turbo.text_encoder.config.to_dict()


def test_an_empty_folder_is_taken_and_a_used_one_refused(turbo: Components, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert save_components(turbo, tmp_path / "empty") == tmp_path / "empty"
    before = sorted(path for path in tiny.rglob("*"))
    for target in (tiny, tmp_path / "empty", tiny / "model_index.json"):
        with pytest.raises(RequestError, match="exists and is not an empty folder"):
            save_components(turbo, target)
    assert sorted(path for path in tiny.rglob("*")) == before


FULL_DISK = (
    OSError(28, "No space left on device"),
    SafetensorError('Error while serializing: I/O error: No space left on device (os error 28) at path "/a/.tmpX"'),
)


@pytest.mark.parametrize("error", [KeyboardInterrupt, *FULL_DISK, ValueError])
def test_a_failure_leaves_nothing_behind(
    error: Any, turbo: Components, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("zimage.checkpoint.save.save_file", fail)
    with pytest.raises(CheckpointError if error in FULL_DISK else error) as raised:
        save_components(turbo, tmp_path / "new" / "saved")
    if error in FULL_DISK:
        assert str(raised.value) == f"{tmp_path / 'new' / 'saved'} cannot be written: No space left on device"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (Exception("File too large (os error 27)"), CheckpointError, "saved cannot be written: File too large$"),
        (AttributeError("no such thing"), AttributeError, "no such thing"),
    ],
)
def test_a_full_disk_while_a_tokenizer_is_written(
    error: Exception,
    raised: type[Exception],
    said: str,
    turbo: Components,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its library says so by a plain `Exception`."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(type(turbo.tokenizer), "save_pretrained", fail)
    with pytest.raises(raised, match=said):
        save_components(dataclasses.replace(turbo, folder=None), tmp_path / "saved")
    assert os.listdir(tmp_path) == []


def test_what_is_no_plain_model_is_refused(turbo: Components, tmp_path: Path) -> None:
    turbo.transformer.layers[0].attention.to_q = torch.nn.Sequential(turbo.transformer.layers[0].attention.to_q)
    with pytest.raises(
        CheckpointError, match=r"transformer is no plain model: 2 of its tensors differ.*detach adapters"
    ):
        save_components(turbo, tmp_path / "saved")
    assert os.listdir(tmp_path) == []


def test_weights_that_are_elsewhere_are_refused(turbo: Components, tmp_path: Path) -> None:
    turbo.vae.to("meta")
    with pytest.raises(CheckpointError, match="the vae is no plain model"):
        save_components(turbo, tmp_path / "saved")
    assert os.listdir(tmp_path) == []


def test_a_source_that_was_damaged_meanwhile_is_not_passed_on(copy: Path, tmp_path: Path) -> None:
    components = load_components(copy, dtype=torch.float32)
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be built"):
        save_components(components, tmp_path / "saved")
    assert os.listdir(tmp_path) == ["copy"]


@pytest.mark.parametrize("size", ["many", "0GB", "-1GB", "nanGB", -1, 0, None, 1.5, True])
def test_a_shard_size_that_is_none(size: Any, turbo: Components, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="max_shard_size must be bytes or like '5GB'"):
        save_components(turbo, tmp_path / "saved", max_shard_size=size)
    assert os.listdir(tmp_path) == []
