"""Text encoders in a file of their own: what llama.cpp and ComfyUI write is read as the folder's, and stays packed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from zimage import CheckpointError, RequestError, ZImagePipeline
from zimage.checkpoint.gguf import read_gguf_header
from zimage.checkpoint.headers import read_header
from zimage.cli import main
from zimage.memory.sizes import GGML_BLOCKS
from zimage.models import ggml
from zimage.models.quantized import PackedLinear

from .writers import Weights, float8, ldm, llama, weights_of, widened, write_gguf

MIXED = {"attn_q": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "ffn_up": "Q5_0", "token_embd": "Q6_K"}
"""As files of medium size have them."""


def load(folder: Path, file: Path | None, dtype: str = "float32", **options: Any) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, text_encoder=file, device="cpu", dtype=dtype, **options)


def features(pipe: ZImagePipeline, text: str = "a fox under a green lamp") -> Tensor:
    pipe.text_encoder.forget()
    return pipe.text_encoder.encode(pipe.text_encoder.tokenize(text, 512))


def plain(weights: Weights) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def folder(shallow_folder: Path) -> Path:
    """Its layers have rows of 512 and 1536 numbers, whole blocks of every kind."""
    return shallow_folder


@pytest.fixture(scope="module")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "Qwen3-Q4_K_M.gguf"
    kinds = {f"{name}.weight": kind for name, kind in MIXED.items()}
    named = llama(weights_of(folder, "text_encoder"))

    def kind_of(name: str) -> str:
        return kinds.get(name.split(".", 2)[-1] if name.startswith("blk") else name, "Q8_0")

    return write_gguf(path, named, kind_of, "qwen3")


WRITERS: dict[str, Callable[[Path, Weights], object]] = {
    "llama.cpp's": lambda path, weights: write_gguf(path, llama(weights), architecture="qwen3"),
    "ComfyUI's": lambda path, weights: save_file(dict(weights), path),
    "plain": lambda path, weights: save_file(plain(weights), path),
    "without the last layer": lambda path, weights: save_file(
        {name: one for name, one in weights.items() if "layers.2." not in name and name != "model.norm.weight"}, path
    ),
    "with a head": lambda path, weights: save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, path
    ),
    "all in one": lambda path, weights: save_file(
        {
            "model.diffusion_model.x_embedder.weight": torch.ones(2, 2),
            "vae.decoder.conv_in.bias": torch.ones(2),
            "text_encoders.qwen3_4b.logit_scale": torch.ones(()),
            **{f"text_encoders.qwen3_4b.transformer.{name}": one for name, one in weights.items()},
        },
        path,
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_plain_file_gives_the_weights_of_the_folder(name: str, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / ("model.gguf" if name == "llama.cpp's" else "model.safetensors")
    weights = {key: tensor + 0.25 for key, tensor in weights_of(tiny, "text_encoder").items()}  # not the folder's own
    WRITERS[name](file, weights)
    pipe = load(tiny, file)
    found = pipe.text_encoder.model.state_dict()
    assert found.keys() == load(tiny, None).text_encoder.model.state_dict().keys()
    assert all(torch.equal(found[key], weights[f"model.{key}"]) for key in found)


def test_packed_layers_stay_so_and_captions_are_those_of_the_widened_weights(folder: Path, mixed: Path) -> None:
    pipe, wide = load(folder, mixed), load(folder, None)
    layers = {name: one for name, one in pipe.text_encoder.model.named_modules() if isinstance(one, PackedLinear)}
    assert len(layers) == 3 * 7  # all matrices of the layers that are read
    assert {one.kind for one in layers.values()} == {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    stored = {one.name: one for one in GGUFReader(mixed).tensors}
    named = llama({name: torch.tensor(0) for name in wide.text_encoder.model.state_dict()})
    state = dict(zip(named, wide.text_encoder.model.state_dict().values(), strict=True))
    for name, target in state.items():
        values = dequantize(stored[name].data, GGMLQuantizationType(stored[name].tensor_type))
        target.copy_(torch.from_numpy(np.array(values)).view(target.shape))
    assert torch.equal(features(pipe), features(wide))
    assert pipe.weights == "gguf"
    assert not torch.allclose(features(pipe), features(load(folder, None)), atol=1e-3)


@pytest.mark.parametrize("source", ["memory", "files"])
def test_a_text_encoder_of_its_own_passes_through_the_device(folder: Path, mixed: Path, source: str) -> None:
    pipe = load(folder, mixed)
    made = features(pipe)
    assert pipe.plan is not None
    placement = replace(pipe.plan.placement, text_encoder="streamed", slots=2, text_source=source)
    streamed = load(folder, mixed, memory=replace(pipe.plan, placement=placement))
    assert streamed.plan is not None
    assert streamed.plan.placement.text_encoder == "streamed"
    assert torch.equal(features(streamed), made)
    pipe.enable_model_cpu_offload()
    assert torch.equal(features(pipe), made)
    file = Path(shutil.copy(mixed, folder.parent / "changed.gguf"))
    changed = load(folder, file, memory=replace(pipe.plan, placement=replace(placement, text_source="files")))
    file.touch()
    with pytest.raises(CheckpointError, match=r"changed\.gguf has changed since the model was loaded"):
        features(changed)


def test_the_plan_counts_the_bytes_of_the_file(folder: Path, mixed: Path) -> None:
    pipe, full = load(folder, mixed, "bfloat16"), load(folder, None, "bfloat16")
    assert pipe.plan is not None
    assert full.plan is not None
    packed = [one.weight for one in pipe.text_encoder.model.modules() if isinstance(one, PackedLinear)]
    assert pipe.plan.sizes.packed == sum(pipe.plan.sizes.packed_text) == sum(one.numel() for one in packed)
    models = (pipe.text_encoder.model, pipe.transformer, pipe.autoencoder.vae)
    held = sum(weight.numel() * weight.element_size() for model in models for weight in model.parameters())
    sizes = full.plan.sizes
    saved = full.plan.stages[2].device - pipe.plan.stages[2].device
    assert 2 * (sizes.text_encoder + sizes.transformer + sizes.vae) - held == pytest.approx(saved, abs=32)
    widest = 2 * sizes.text_width * sizes.text_intermediate  # room for one weight that is widened
    more = [plan.stages[0].device - plan.stages[2].device for plan in (pipe.plan, full.plan)]
    assert more[0] - more[1] == widest


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale", None])
def test_eight_bit_floats_of_a_text_encoder_stay_so(tiny: Path, scale: str | None, tmp_path: Path) -> None:
    stored = float8(weights_of(tiny, "text_encoder"), lambda name: "proj" in name or "embed" in name, scale)
    extra = {} if scale is None else {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    save_file({**stored, **extra}, tmp_path / "qwen_3_4b_fp8.safetensors")
    pipe, wide = load(tiny, tmp_path / "qwen_3_4b_fp8.safetensors"), load(tiny, None)
    packed = [one for one in pipe.text_encoder.model.modules() if isinstance(one, PackedLinear)]
    assert {one.kind for one in packed} == {"F8_E4M3"}
    assert len(packed) == 2 * 7
    values = plain(widened(stored))
    for name, tensor in wide.text_encoder.model.state_dict().items():
        tensor.copy_(values[name])
    assert torch.equal(features(pipe), features(wide))
    assert pipe.weights == "fp8"


def damaged(path: Path, source: Path, change: Callable[[bytearray], object]) -> Path:
    content = bytearray(source.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def test_what_is_no_such_text_encoder_is_refused(tiny: Path, folder: Path, mixed: Path, tmp_path: Path) -> None:
    weights = weights_of(tiny, "text_encoder")
    other = write_gguf(tmp_path / "llama.gguf", llama(weights), architecture="llama")
    with pytest.raises(CheckpointError, match=r"llama\.gguf is of 'llama', and the text encoder .* 'qwen3'"):
        load(tiny, other)
    with pytest.raises(CheckpointError, match=r"Qwen3-Q4_K_M.gguf \(of 'qwen3'\) .* misshapen: 'embed_tokens.weight'"):
        load(tiny, mixed)
    lora = {"layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"lora\.safetensors is a LoRA or the like and no text encoder"):
        load(tiny, tmp_path / "lora.safetensors")
    cut = damaged(tmp_path / "cut.gguf", mixed, lambda content: content.__delitem__(slice(-100, None)))
    with pytest.raises(CheckpointError, match=r"cut\.gguf is not a whole GGUF file"):
        load(folder, cut)
    with pytest.raises(CheckpointError, match="text_encoder must be a file, got 7"):
        load(tiny, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "token_embd.weight", "blk.0.ffn_norm.weight"])
def test_values_that_are_no_numbers_are_refused(name: str, folder: Path, mixed: Path, tmp_path: Path) -> None:
    entry = read_gguf_header(mixed).entries[name]
    bad = np.array([np.nan], dtype=np.float32 if entry.dtype == "F32" else np.float16).tobytes()
    last = entry.end - (len(bad) if entry.dtype == "F32" else GGML_BLOCKS[entry.dtype][1])
    place = last if entry.dtype == "F32" else last + ggml.KINDS[entry.dtype].halves[0]
    file = damaged(
        tmp_path / "nan.gguf", mixed, lambda content: content.__setitem__(slice(place, place + len(bad)), bad)
    )
    with pytest.raises(CheckpointError, match=r"nan\.gguf: the tensor '.*' has values that are NaN or infinite"):
        load(folder, file)


def test_what_is_saved_has_the_text_encoder_of_the_file(tiny: Path, mixed: Path, folder: Path, tmp_path: Path) -> None:
    weights = {name: tensor + 0.25 for name, tensor in weights_of(tiny, "text_encoder").items()}
    write_gguf(tmp_path / "qwen.gguf", llama(weights), architecture="qwen3")
    pipe = load(tiny, tmp_path / "qwen.gguf")
    pipe.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    assert len(list((tmp_path / "saved" / "text_encoder").glob("*.safetensors"))) > 1
    saved = weights_of(tmp_path / "saved", "text_encoder")
    assert saved.keys() == weights.keys()  # its last layer, which nobody reads, too
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    again = load(tmp_path / "saved", None)
    assert torch.equal(features(again), features(pipe))
    with pytest.raises(RequestError, match="stored in gguf, so it cannot be saved"):
        load(folder, mixed).save_pretrained(tmp_path / "new")


VAE_WRITERS: dict[str, Callable[[Weights], dict[str, Tensor]]] = {
    "diffusers'": dict,
    "latent diffusion's": ldm,
    "a checkpoint's": lambda weights: ldm(weights, "first_stage_model."),
    "all in one": lambda weights: {**ldm(weights, "vae."), "model.diffusion_model.x_embedder.weight": torch.ones(2, 2)},
}


@pytest.mark.parametrize("name", VAE_WRITERS)
def test_a_vae_of_its_own(name: str, tiny: Path, tmp_path: Path) -> None:
    weights = {key: tensor + 0.25 for key, tensor in weights_of(tiny, "vae").items()}
    save_file(VAE_WRITERS[name](weights), tmp_path / "ae.safetensors")
    pipe = ZImagePipeline.from_pretrained(tiny, vae=tmp_path / "ae.safetensors", device="cpu", dtype="float32")
    found = pipe.autoencoder.vae.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in found)


def test_a_vae_of_other_channels_is_refused(tiny: Path, tmp_path: Path) -> None:
    weights = ldm(weights_of(tiny, "vae"))
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"][:, :4].clone()
    save_file(weights, tmp_path / "sd.safetensors")
    with pytest.raises(
        CheckpointError, match=r"the VAE in .*sd\.safetensors has 4 latent channels and the model has 16"
    ):
        ZImagePipeline.from_pretrained(tiny, vae=tmp_path / "sd.safetensors", device="cpu")


def test_a_picture_names_all_files_and_can_be_made_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code or 0), *capfd.readouterr()

    monkeypatch.chdir(tmp_path)
    bare = Path(shutil.copytree(tiny, tmp_path / "bare"))
    for part in ("text_encoder", "vae"):
        for file in (bare / part).glob("*.safetensors"):
            file.unlink()  # nothing of them is needed
    write_gguf(tmp_path / "qwen.gguf", llama(weights_of(tiny, "text_encoder")), architecture="qwen3")
    save_file(ldm(weights_of(tiny, "vae")), tmp_path / "ae.safetensors")
    files = ("--text-encoder", "qwen.gguf", "--vae", "ae.safetensors")
    code, out, _ = run(
        "generate", "a fox", "--model", bare, *files, "--device", "cpu", "--steps", 2, "--seed", 5, "--size", 64,
        "--any-size", "--quiet", "--json", "--output", "fox.png",
    )  # fmt: skip
    assert code == 0
    made = json.loads(out)["model"]
    assert (made["transformer"], Path(made["text_encoder"]).name, Path(made["vae"]).name) == (
        "", "qwen.gguf", "ae.safetensors",
    )  # fmt: skip
    assert run("replay", "fox.png", "--quiet")[:2] == (0, "same bits\n")
    (tmp_path / "qwen.gguf").rename(tmp_path / "moved.gguf")
    code, _, error = run("replay", "fox.png", "--quiet")
    assert code == 1
    assert "qwen.gguf' is missing" in error
    assert "pass --model, --text-encoder, --vae" in error
    assert run("replay", "fox.png", "--quiet", "--text-encoder", "moved.gguf")[:2] == (0, "same bits\n")
    code, out, _ = run(
        "plan", "--model", bare, "--text-encoder", "moved.gguf", "--vae", "ae.safetensors", "--memory", "2GB"
    )
    assert code == 0
    assert "prompt" in out


def test_a_header_of_a_file_from_safetensors_is_left_as_it_is(tiny: Path, tmp_path: Path) -> None:
    """Entries get other names, not other places."""
    save_file(ldm(weights_of(tiny, "vae")), tmp_path / "ae.safetensors")
    from zimage.checkpoint.single import read_single

    raw, own = read_header(tmp_path / "ae.safetensors"), read_single(tmp_path / "ae.safetensors", "vae").headers[0]
    places = sorted((one.start, one.end) for one in own.entries.values())
    assert places == sorted((one.start, one.end) for one in raw.entries.values())
    assert load_file(tmp_path / "ae.safetensors").keys() != own.entries.keys()
