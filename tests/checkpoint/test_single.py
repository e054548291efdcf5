"""Transformers in a file of their own: safetensors or GGUF, in either naming, plain or in fewer bits."""

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
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import save_file
from torch import Tensor, nn

from zimage import CheckpointError, NotEnoughMemory, RequestError, ZImagePipeline
from zimage.cli import main
from zimage.memory.peaks import predict
from zimage.memory.sizes import GGML_BLOCKS
from zimage.models import ggml
from zimage.models.quantized import PackedLinear
from zimage.testing import build_checkpoint

from .writers import Weights, published, weights_of, write_gguf

PICTURE: dict[str, Any] = {"height": 128, "width": 128, "num_inference_steps": 3, "seed": 4, "any_size": True}
MIXED = {"w1": "Q4_K", "w2": "Q6_K", "w3": "Q5_K", "qkv": "Q3_K", "out": "IQ4_XS"}
"""As files for small cards have them: more bits where they matter more."""


@pytest.fixture(scope="module")
def folder(shallow_folder: Path) -> Path:
    """Its layers have rows of 768 and 2048 numbers, whole blocks of every kind."""
    return shallow_folder


@pytest.fixture(scope="module")
def bare(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without the transformer's weights."""
    copied = Path(shutil.copytree(folder, tmp_path_factory.mktemp("bare") / "model"))
    for file in (copied / "transformer").glob("*.safetensors*"):
        file.unlink()
    return copied


@pytest.fixture(scope="module")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "model-Q4.gguf"
    return write_gguf(path, published(weights_of(folder)), lambda name: MIXED.get(name.split(".")[-2:][0], "Q8_0"))


def load(folder: Path, file: Path | str | None, dtype: str = "float32", **options: Any) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, transformer=file, device="cpu", dtype=dtype, **options)


def latents(pipe: ZImagePipeline, **options: Any) -> Tensor:
    made = pipe("a fox", progress=False, output_type="latent", **{**PICTURE, **options})
    return made.images[0]  # type: ignore[union-attr]


def state(pipe: ZImagePipeline) -> dict[str, Tensor]:
    return dict(pipe.transformer.state_dict())


WRITERS: dict[str, Callable[[Path, Weights], None]] = {
    "diffusers' names": lambda path, weights: save_file(dict(weights), path),
    "published names": lambda path, weights: save_file(published(weights), path),
    "ComfyUI's prefix": lambda path, weights: save_file(published(weights, "model.diffusion_model."), path),
    "another prefix": lambda path, weights: save_file(published(weights, "diffusion_model."), path),
    "a tensor of no use": lambda path, weights: save_file(
        {**published(weights), "norm_final.weight": torch.ones(64)}, path
    ),
    "GGUF": lambda path, weights: write_gguf(path, published(weights)) and None,
    "GGUF in diffusers' names": lambda path, weights: write_gguf(path, weights) and None,
    "GGUF without leading dimensions": lambda path, weights: (
        write_gguf(path, {name: one[0] if "pad_token" in name else one for name, one in published(weights).items()})
        and None
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_plain_file_gives_the_weights_of_the_folder(name: str, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / ("model.gguf" if "GGUF" in name else "model.safetensors")
    WRITERS[name](file, weights_of(tiny))
    found, expected = state(load(tiny, file)), state(load(tiny, None))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_file_takes_the_place_of_the_folders_weights(mixed: Path, bare: Path) -> None:
    with pytest.raises(CheckpointError, match=r"transformer should have diffusion_pytorch_model\.safetensors"):
        load(bare, None)
    assert torch.isfinite(latents(load(bare, mixed))).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_keep_the_bits_of_their_file_and_the_rest_is_widened(folder: Path, mixed: Path, dtype: str) -> None:
    pipe = load(folder, mixed, dtype)
    kinds = set()
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, PackedLinear):
            assert "adaLN" not in name
            assert name.startswith(("layers", "noise_refiner", "context_refiner"))
            assert module.weight.dtype == torch.uint8
            kinds.add(module.kind)
        elif isinstance(module, nn.Linear):
            assert "adaLN" in name or not name.startswith(("layers", "noise_refiner", "context_refiner"))
            assert module.weight.dtype == getattr(torch, dtype)
    assert kinds == {"Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}
    modulation = weights_of(folder)["layers.2.adaLN_modulation.0.weight"]
    rounded = quantize(modulation.float().numpy(), GGMLQuantizationType.Q8_0)
    expected = ggml.widen(torch.from_numpy(rounded), "Q8_0", getattr(torch, dtype))
    assert torch.equal(pipe.transformer.layers[2].adaLN_modulation[0].weight, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_picture_is_that_of_the_widened_weights(folder: Path, mixed: Path, dtype: str) -> None:
    pipe, plain = load(folder, mixed, dtype), load(folder, None, dtype)
    for name, module in pipe.transformer.named_modules():
        target = plain.transformer.get_submodule(name)
        for leaf, weight in module.named_parameters(recurse=False):
            is_packed = isinstance(module, PackedLinear) and leaf == "weight"
            setattr(target, leaf, nn.Parameter(module.widened(plain.dtype), False) if is_packed else weight)
    assert torch.equal(latents(pipe), latents(plain))


@pytest.mark.parametrize(("kind", "bound"), [("F16", 1.2e-3), ("Q8_0", 0.03), ("Q5_1", 0.13), ("Q4_0", 0.3)])
def test_fewer_bits_change_the_picture_so_much(
    folder: Path, kind: str, bound: float, tmp_path: Path, expected: Tensor
) -> None:
    file = write_gguf(tmp_path / "model.gguf", published(weights_of(folder)), lambda name: kind)
    error = (latents(load(folder, file)) - expected).square().mean().sqrt() / expected.std()
    assert bound / 20 < error < bound


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    return latents(load(folder, None))


@pytest.mark.parametrize("source", ["memory", "files"])
def test_packed_layers_pass_through_the_device_with_the_same_bits(folder: Path, mixed: Path, source: str) -> None:
    pipe = load(folder, mixed)
    made = latents(pipe)
    assert pipe.plan is not None
    placement = replace(
        pipe.plan.placement, text_encoder="streamed", resident_blocks=2, context_resident=False, slots=2,
        text_source=source, block_source=source,
    )  # fmt: skip
    streamed = load(folder, mixed, memory=replace(pipe.plan, placement=placement))
    assert streamed.weights == "gguf"
    assert torch.equal(latents(streamed), made)
    pipe.enable_sequential_cpu_offload()
    pipe.text_encoder.forget()
    assert torch.equal(latents(pipe), made)


def test_a_file_that_changed_is_not_streamed_from(folder: Path, mixed: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(mixed, tmp_path / "model.gguf"))
    pipe = load(folder, file)
    pipe.enable_sequential_cpu_offload()
    with open(file, "r+b") as opened:
        opened.seek(-1, 2)
        opened.write(b"\1")
    file.touch()
    with pytest.raises(CheckpointError, match=r"model.gguf has changed since the model was loaded"):
        latents(pipe)


def test_the_plan_counts_the_bytes_of_the_file(folder: Path, mixed: Path) -> None:
    pipe, full = load(folder, mixed, "bfloat16"), load(folder, None, "bfloat16")
    assert pipe.plan is not None
    assert full.plan is not None
    models = (pipe.text_encoder.model, pipe.transformer, pipe.autoencoder.vae)
    held = sum(weight.numel() * weight.element_size() for model in models for weight in model.parameters())
    sizes = full.plan.sizes
    saved = full.plan.stages[2].device - pipe.plan.stages[2].device
    assert 2 * (sizes.text_encoder + sizes.transformer + sizes.vae) - held == pytest.approx(saved, abs=32)
    largest = max(weight.numel() for weight in full.transformer.layers[0].parameters())
    more = [plan.stages[1].device - plan.stages[2].device for plan in (pipe.plan, full.plan)]
    assert more[0] - more[1] == pytest.approx(2 * largest, rel=0.3)  # room for one weight that is widened
    assert pipe.plan.sizes.packed == sum(
        one.weight.numel() for one in pipe.transformer.modules() if isinstance(one, PackedLinear)
    )
    assert "in fewer bits" in str(pipe.plan)
    assert "in fewer bits" not in str(full.plan)


def test_whether_layers_are_in_bfloat16_is_that_of_their_matrices_alone(tmp_path: Path) -> None:
    """Not of embedders, norms and padding, which files often have in float32."""
    folder = build_checkpoint(tmp_path / "model", dtype="bfloat16")
    narrow = "layers.0.attention.to_q.weight"
    for wide, expected in (("x_pad_token", True), ("layers.0.adaLN_modulation.0.weight", True), (narrow, False)):
        tensors = weights_of(folder)
        save_file(
            {name: one.float() if name == wide else one for name, one in tensors.items()}, tmp_path / "one.safetensors"
        )
        plan = load(folder, tmp_path / "one.safetensors").plan
        assert plan is not None
        assert plan.sizes.in_bfloat16 is expected, wide


def test_a_file_fits_where_the_folder_does_not(folder: Path, mixed: Path) -> None:
    full = load(folder, None, "bfloat16").plan
    assert full is not None
    frugal = replace(
        full.placement, text_encoder="streamed", resident_blocks=0, context_resident=False, slots=2, strip_levels=2
    )
    work = replace(full.work, height=full.sizes.native_side // 4, width=full.sizes.native_side // 4)
    tight = int((max(one.device for one in predict(full.sizes, work, full.budget, frugal)) - 2**16) / 0.9)
    with pytest.raises(NotEnoughMemory):
        load(folder, None, "bfloat16", memory=tight, weight_dtype="full")
    pipe = load(folder, mixed, "bfloat16", memory=tight, weight_dtype="full")
    assert torch.equal(latents(pipe), latents(load(folder, mixed, "bfloat16")))


def test_the_text_encoder_can_have_fewer_bits_besides(folder: Path, mixed: Path) -> None:
    pipe = load(folder, mixed, weight_dtype="int8")
    assert pipe.weights == "int8"
    assert {one.kind for one in pipe.text_encoder.model.modules() if hasattr(one, "kind")} == {"int8"}
    assert "int8" not in {one.kind for one in pipe.transformer.modules() if hasattr(one, "kind")}
    assert torch.isfinite(latents(pipe)).all()


def test_what_cannot_be_done_with_it_is_said(folder: Path, mixed: Path, tmp_path: Path) -> None:
    pipe = load(folder, mixed)
    for refused in (lambda: pipe.to(torch.bfloat16), lambda: pipe.save_pretrained(tmp_path / "new")):
        with pytest.raises(RequestError, match=r"stored in gguf, so it cannot be .*again without the GGUF file"):
            refused()
    assert not (tmp_path / "new").exists()


def test_what_is_no_such_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "old.ckpt").write_bytes(b"x")
    for wrong, came in (
        (tmp_path / "none.gguf", "is missing"), (tiny, "is a folder"), (tmp_path / "old.ckpt", "is of another kind"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=rf"must be a .safetensors or .gguf file, .*{came}"):
            load(tiny, wrong)
    with pytest.raises(CheckpointError, match="transformer must be a file, got 7"):
        load(tiny, 7)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"'a\\x00b.gguf' is missing"):
        load(tiny, "a\0b.gguf")


def test_another_model_is_refused_by_its_tensors(tiny: Path, mixed: Path, tmp_path: Path) -> None:
    flux = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(96, 32), "img_in.weight": torch.zeros(32, 32)}
    file = write_gguf(tmp_path / "flux.gguf", flux, architecture="flux")
    with pytest.raises(CheckpointError, match=r"flux.gguf \(of 'flux'\) are not those of the transformer .*missing"):
        load(tiny, file)
    with pytest.raises(CheckpointError, match=r"misshapen: .* for \[\d*, ?64\]"):
        load(tiny, mixed)
    twice = {**published(weights_of(tiny)), **weights_of(tiny)}
    save_file({name: one.clone() for name, one in twice.items()}, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match="twice, in two ways of naming"):
        load(tiny, tmp_path / "twice.safetensors")
    prefixes = {f"{prefix}diffusion_model.{name}": one for prefix in ("", "model.") for name, one in twice.items()}
    save_file({name: one.clone() for name, one in prefixes.items()}, tmp_path / "prefixes.safetensors")
    with pytest.raises(CheckpointError, match="twice, after two prefixes"):
        load(tiny, tmp_path / "prefixes.safetensors")
    odd = published(weights_of(tiny))
    fused = "layers.0.attention.qkv.weight"
    odd[fused] = torch.cat([odd[fused], odd[fused][:1]])  # not three parts as tall as one another
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=rf"unexpected: .*{fused}"):
        load(tiny, tmp_path / "odd.safetensors")


@pytest.mark.parametrize("name", ["layers.1.feed_forward.w1.weight", "layers.1.adaLN_modulation.0.weight"])
def test_a_scale_that_is_not_finite_is_refused(name: str, folder: Path, mixed: Path, tmp_path: Path) -> None:
    from zimage.checkpoint.gguf import read_gguf_header

    content, entry = bytearray(mixed.read_bytes()), read_gguf_header(mixed).entries[name]
    place = entry.end - GGML_BLOCKS[entry.dtype][1] + ggml.KINDS[entry.dtype].halves[0]
    content[place : place + 2] = np.array([np.nan], dtype=np.float16).tobytes()
    (tmp_path / "nan.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"nan.gguf: the tensor '{name}' has values that are NaN or infinite"):
        load(folder, tmp_path / "nan.gguf")


def test_a_widened_value_beyond_float16_is_refused(tiny: Path, tmp_path: Path) -> None:
    weights = published(weights_of(tiny))
    weights["cap_embedder.1.weight"][0, 0] = 1e6
    file = write_gguf(tmp_path / "large.gguf", weights, lambda name: "Q8_0")
    with pytest.raises(CheckpointError, match=r"1.weight' has values up to 1\.\d*e\+06, beyond the range of float16"):
        load(tiny, file, "float16")
    load(tiny, file, "bfloat16")


def test_a_picture_names_the_file_and_can_be_made_again(
    folder: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return int(ended.value.code or 0), capfd.readouterr().out

    monkeypatch.chdir(tmp_path)
    code, out = run(
        "generate", "a fox", "--model", folder, "--transformer", mixed, "--device", "cpu", "--steps", 2, "--seed", 5,
        "--size", 128, "--any-size", "--quiet", "--json", "--output", "fox.png",
    )  # fmt: skip
    assert code == 0
    made = json.loads(out)
    assert made["model"]["transformer"].endswith("model-Q4.gguf")
    assert made["runtime"]["weights"] == "gguf"
    code, out = run("replay", "fox.png", "--quiet")
    assert (code, out.strip()) == (0, "same bits")
    code, out = run("replay", "fox.png", "--quiet", "--model", folder)
    assert code == 1
    assert "model fingerprint was" in out
    assert "weights was gguf, here it is full" in out
    code, out = run("plan", "--model", folder, "--transformer", mixed, "--memory", "2GB", "--device", "cpu", "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["device_peak"] < load(folder, None, "bfloat16").plan.device_peak  # type: ignore[union-attr]
