"""What is saved is read back as the same adapter, here and by diffusers, and no file is ever half written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline as DiffusersPipeline
from safetensors.torch import load_file
from torch import Tensor

from zimage import ZImagePipeline
from zimage.errors import AdapterError, RequestError
from zimage.files.atomic import FileError

SCALE = 0.5
Reference = dict[str, tuple[Tensor, Tensor]]
Draw = Callable[..., Tensor]
WriteLora = Callable[..., Path]


@pytest.mark.parametrize("naming", ["peft", "comfyui"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_is_saved_is_read_as_it_was(
    naming: str, dora: bool, pipe: ZImagePipeline, reference: Reference, write_lora: WriteLora, tmp_path: Path
) -> None:
    tensors = {}
    for number, (module, (down, up)) in enumerate(reference.items()):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        tensors |= {f"{module}.lora_A.weight": down.to(dtype), f"{module}.lora_B.weight": up.to(dtype)}
        tensors |= {f"{module}.alpha": torch.tensor(0.3)} if number % 2 else {}
        tensors |= {f"{module}.dora_scale": torch.rand(len(up), 1)} if dora else {}
    pipe.load_adapter(write_lora(tensors), "first")
    file = pipe.save_adapter(tmp_path / "again.safetensors", "first", naming=naming)
    assert file == tmp_path / "again.safetensors"
    pipe.load_adapter(file, "second")
    first, second = pipe._attachments["first"], pipe._attachments["second"]
    assert list(first.deltas) == list(second.deltas)
    for module, delta in first.deltas.items():
        other = second.deltas[module]
        if naming == "peft":
            assert other.scale == 1.0
            assert torch.equal(delta.down.float() * delta.scale, other.down.float())
        else:
            assert delta.scale == pytest.approx(other.scale, rel=1e-12)
            assert torch.equal(delta.down, other.down)
        if naming == "comfyui" or delta.scale == 1.0:
            assert delta.down.dtype == other.down.dtype
        assert torch.equal(delta.up, other.up)
        assert delta.up.dtype == other.up.dtype
        assert (delta.magnitude is None) == (other.magnitude is None) == (not dora)
        if delta.magnitude is not None and other.magnitude is not None:
            assert torch.equal(delta.magnitude, other.magnitude)
    assert list(tmp_path.glob(".zimage-*")) == []


def test_every_format_can_be_saved_again(pipe: ZImagePipeline, in_format: Path, draw: Draw, tmp_path: Path) -> None:
    """Fused layers too, of which three share one matrix."""
    pipe.load_adapter(in_format, "it")
    expected = draw(pipe)
    for naming in ("peft", "comfyui"):
        file = pipe.save_adapter(tmp_path, "it", naming=naming)
        assert file.name == ("pytorch_lora_weights.safetensors" if naming == "peft" else "it.safetensors")
        pipe.load_adapter(file, naming)
        assert torch.equal(draw(pipe, adapters={naming: 1.0}), expected)


@pytest.mark.parametrize("naming", ["peft", "comfyui"])
def test_diffusers_reads_it(naming: str, pipe: ZImagePipeline, ink: Path, reference: Reference, tmp_path: Path) -> None:
    """As it begins to load it; its conversion knows no other names than its own for the layers around the blocks."""
    pipe.load_adapter(ink)
    file = pipe.save_adapter(tmp_path / "saved.safetensors", "ink", naming=naming)
    converted = DiffusersPipeline.lora_state_dict(str(file))
    for module, (down, up) in reference.items():
        if naming == "comfyui" and ("x_embedder" in module or "final" in module):
            continue
        down_there, up_there = (converted[f"transformer.{module}.lora_{half}.weight"] for half in "AB")
        assert torch.equal((up_there @ down_there).float(), SCALE * up @ down)


def test_comfyui_has_the_published_names(pipe: ZImagePipeline, ink: Path, tmp_path: Path) -> None:
    pipe.load_adapter(ink)
    names = set(load_file(pipe.save_adapter(tmp_path, "ink", naming="comfyui")))
    assert {
        "diffusion_model.layers.0.attention.out.lora_down.weight",
        "diffusion_model.x_embedder.lora_up.weight",
        "diffusion_model.final_layer.linear.alpha",
        "diffusion_model.cap_embedder.1.lora_down.weight",
    } <= names
    assert not any("to_out" in name or "2-1" in name for name in names)


def test_what_cannot_be_saved_is_refused(pipe: ZImagePipeline, ink: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    pipe.load_adapter(ink)
    with pytest.raises(RequestError, match="what is written needs a path, got None"):
        pipe.save_adapter(None, "ink")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="naming must be 'peft' or 'comfyui', got 'kohya'"):
        pipe.save_adapter(tmp_path, "ink", naming="kohya")
    with pytest.raises(RequestError, match=r"saved as a .safetensors file or into a folder that exists"):
        pipe.save_adapter(tmp_path / "none", "ink")
    with pytest.raises(AdapterError, match="no adapter named 'inc'"):
        pipe.save_adapter(tmp_path, "inc")
    for name in ("../escaped", "/escaped", "a\\b", "C:b", "..", "."):
        pipe.load_adapter(ink, name)
        with pytest.raises(RequestError, match="cannot be that of a file in a folder; say the file"):
            pipe.save_adapter(folder, name, naming="comfyui")
        assert [path.name for path in tmp_path.rglob("*")] == ["folder"]
        assert pipe.save_adapter(tmp_path / "said.safetensors", name, naming="comfyui").is_file()
        (tmp_path / "said.safetensors").unlink()
    file = pipe.save_adapter(tmp_path, "ink")
    content = file.read_bytes()
    with pytest.raises(FileError, match="exists already"):
        pipe.save_adapter(tmp_path, "ink")
    pipe.save_adapter(tmp_path, "ink", overwrite=True)
    assert file.read_bytes() == content
    with pytest.raises(FileError, match="there is no folder"):
        pipe.save_adapter(tmp_path / "none" / "ink.safetensors", "ink")
