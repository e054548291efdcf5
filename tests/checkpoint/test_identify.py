"""A file says by its tensors' names what it is, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from zimage import CheckpointError
from zimage.checkpoint.identify import FilePart, identify
from zimage.cli import main
from zimage.testing import build_controlnet

from .writers import ldm, llama, published, weights_of, write_gguf

COMPONENTS = ("transformer", "text_encoder", "vae")


@pytest.fixture
def inspected(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `zimage inspect`: exit code, standard output and error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["inspect", *map(str, arguments)])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def kept(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}


def written(tiny: Path, component: str, how: str) -> dict[str, Any]:
    weights = weights_of(tiny, component)
    others: dict[str, Callable[..., Mapping[str, Any]]] = {"transformer": published, "text_encoder": llama, "vae": ldm}
    return kept(weights if how == "own" else others[component](weights))


@pytest.mark.parametrize("how", ["own", "other"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component(tiny: Path, tmp_path: Path, component: str, how: str) -> None:
    file = tmp_path / "some.safetensors"
    tensors = written(tiny, component, how)
    save_file(tensors, file)
    count = sum(tensor.numel() for tensor in weights_of(tiny, component).values())
    assert identify(file) == (FilePart(kind=component, parameters=count, bytes=4 * count, dtypes=("F32",)),)


def test_a_gguf_file(tiny: Path, tmp_path: Path) -> None:
    weights = weights_of(tiny)
    file = write_gguf(tmp_path / "some.gguf", published(weights), lambda name: "Q8_0")
    (part,) = identify(file)
    assert (part.kind, part.dtypes) == ("transformer", ("F32", "Q8_0"))
    assert part.parameters == sum(tensor.numel() for tensor in weights.values())
    text = write_gguf(tmp_path / "text.gguf", llama(weights_of(tiny, "text_encoder")), architecture="qwen3")
    assert [part.kind for part in identify(text)] == ["text_encoder"]


def test_all_components_in_one_file(tiny: Path, tmp_path: Path) -> None:
    tensors = kept(published(weights_of(tiny)), "model.diffusion_model.")
    tensors |= kept(weights_of(tiny, "text_encoder"), "text_encoders.qwen3_4b.transformer.")
    tensors |= kept(ldm(weights_of(tiny, "vae")), "first_stage_model.")
    save_file(tensors, tmp_path / "all.safetensors")
    found = {part.kind: part.parameters for part in identify(tmp_path / "all.safetensors")}
    assert found == {
        component: sum(tensor.numel() for tensor in weights_of(tiny, component).values()) for component in COMPONENTS
    }


@pytest.fixture
def others(tmp_path: Path) -> dict[str, Path]:
    tensors = {
        "adapter": {
            f"lora_unet_layers_0_attention_to_q.lora_{half}.weight": torch.ones(4, 4) for half in ("up", "down")
        },
        "dora": {"transformer.layers.0.attention.to_q.lora_A.weight": torch.ones(4, 4)},
        "flux": {"double_blocks.0.img_attn.qkv.weight": torch.ones(4, 4)},
        "empty": {},
    }
    for name, one in tensors.items():
        save_file(one, tmp_path / f"{name}.safetensors")
    build_controlnet(tmp_path / "controlnet.safetensors")
    return {path.stem: path for path in tmp_path.glob("*.safetensors")}


def test_adapters_and_controlnets(others: dict[str, Path], inspected: Any) -> None:
    kinds = {name: identify(others[name])[0].kind for name in ("adapter", "dora", "controlnet")}
    assert kinds == {"adapter": "adapter", "dora": "adapter", "controlnet": "controlnet"}
    for name, option in (("adapter", "--lora"), ("controlnet", "--controlnet")):
        code, out, _ = inspected(others[name], "--json")
        (part,) = json.loads(out)["parts"]
        assert (code, part["kind"], part["option"]) == (0, name, option)


def test_a_table_names_the_option(tiny: Path, inspected: Any) -> None:
    (file,) = (tiny / "vae").glob("*.safetensors")
    code, out, err = inspected(file)
    heads, row = out.splitlines()
    assert (code, err) == (0, "")
    assert heads.split() == ["holds", "parameters", "size", "types", "option"]
    assert (row.split()[0], row.split()[-1]) == ("vae", "--vae")


@pytest.mark.parametrize(
    ("name", "said"),
    [("flux", "no LoRA and no ControlNet; its 1 tensors begin with: 'double_blocks.0"), ("empty", "begin with: none")],
)
def test_what_is_something_else(others: dict[str, Path], inspected: Any, name: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        identify(others[name])
    code, out, err = inspected(others[name])
    assert (code, out) == (1, "")
    assert said in err


def test_a_damaged_file(tmp_path: Path, inspected: Any) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"<html>")
    code, _, err = inspected(tmp_path / "a.safetensors")
    assert (code, "a.safetensors is not a whole safetensors file" in err) == (1, True)


def test_another_format(tmp_path: Path, inspected: Any) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02")
    code, _, err = inspected(tmp_path / "old.ckpt")
    assert (code, "old.ckpt is no .safetensors and no .gguf file" in err) == (1, True)
