"""Transformers in 8-bit floats: read as what they mean, in ComfyUI's ways to write scales and without any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zimage import CheckpointError, RequestError, ZImagePipeline
from zimage.models import packed
from zimage.models.quantized import PackedLinear

from .writers import Weights, float8, published, weights_of, widened

PICTURE: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 4, "any_size": True}


def in_blocks(name: str) -> bool:
    return name.startswith(("layers", "noise_refiner", "context_refiner")) and "adaLN" not in name


def new_style(weights: Weights, rows: bool = False) -> dict[str, Tensor]:
    """As ComfyUI writes them since it has several formats: with the format's name and the scale of inputs."""
    stored = float8(published(weights), in_blocks, "weight_scale", rows)
    layers = [name.removesuffix("weight") for name, one in stored.items() if one.dtype == torch.float8_e4m3fn]
    said = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    return {
        **stored,
        **{f"{layer}comfy_quant": said.clone() for layer in layers},
        **{f"{layer}input_scale": torch.tensor(0.5) for layer in layers},
    }


def old_style(weights: Weights) -> dict[str, Tensor]:
    stored = float8(published(weights), in_blocks)
    marked = {
        **stored,
        "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        "final_layer.linear.scale_weight": torch.tensor(2.0),
    }
    return {f"model.diffusion_model.{name}": one for name, one in marked.items()}


STYLES: dict[str, Callable[[Weights], dict[str, Tensor]]] = {
    "old": old_style,
    "new": new_style,
    "new, by rows": lambda weights: new_style(weights, rows=True),
    "without scales": lambda weights: float8(published(weights), lambda name: True, None),
    "e5m2": lambda weights: float8(weights, in_blocks, "scale_weight", True, torch.float8_e5m2),
}


def load(folder: Path, file: Path | None, dtype: str = "float32", **options: Any) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, transformer=file, device="cpu", dtype=dtype, **options)


def latents(pipe: ZImagePipeline) -> Tensor:
    return pipe("a fox", progress=False, output_type="latent", **PICTURE).images[0]  # type: ignore[union-attr]


def meant(style: str, weights: Weights) -> dict[str, Tensor]:
    """What the tensors of a style mean, by our names."""
    from zimage.checkpoint.names import own_name

    values = {
        name.removeprefix("model.diffusion_model."): one
        for name, one in widened(STYLES[style](weights)).items()
        if not name.endswith(("comfy_quant", "input_scale", "scaled_fp8"))
    }
    named = {}
    for name, one in values.items():
        if ".qkv." in name:
            named |= {name.replace("qkv", f"to_{part}"): third for part, third in zip("qkv", one.chunk(3), strict=True)}
        else:
            named[own_name("transformer", name)] = one
    return named


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("style", STYLES)
def test_a_file_means_what_its_numbers_times_their_scales_are(
    style: str, dtype: str, tiny: Path, tmp_path: Path
) -> None:
    weights = weights_of(tiny)
    save_file(STYLES[style](weights), tmp_path / "fp8.safetensors")
    pipe, expected = load(tiny, tmp_path / "fp8.safetensors", dtype), meant(style, weights)
    kinds, kind = 0, "F8_E5M2" if style == "e5m2" else "F8_E4M3"
    for name, module in pipe.transformer.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            target = expected.pop(f"{name}.{leaf}".lstrip(".")).to(getattr(torch, dtype))
            if isinstance(module, PackedLinear) and leaf == "weight":
                assert module.kind == kind
                assert tensor.dtype == torch.uint8
                assert in_blocks(name)
                kinds, tensor = kinds + 1, module.widened(target.dtype)
            assert torch.equal(tensor, target), name
    assert not expected
    assert kinds == 6 * 7
    assert pipe.weights == "fp8"


def test_the_picture_is_that_of_the_widened_weights_wherever_layers_are(tiny: Path, tmp_path: Path) -> None:
    save_file(new_style(weights_of(tiny), rows=True), tmp_path / "fp8.safetensors")
    pipe, plain = load(tiny, tmp_path / "fp8.safetensors"), load(tiny, None)
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, PackedLinear):
            plain.transformer.get_submodule(name).weight = nn.Parameter(module.widened(torch.float32), False)
    made = latents(pipe)
    assert torch.equal(made, latents(plain))
    assert not torch.allclose(made, latents(load(tiny, None)), atol=1e-3)
    assert pipe.plan is not None
    for source in ("memory", "files"):
        placement = replace(
            pipe.plan.placement, text_encoder="streamed", resident_blocks=1, context_resident=False, slots=2,
            text_source=source, block_source=source,
        )  # fmt: skip
        streamed = load(tiny, tmp_path / "fp8.safetensors", memory=replace(pipe.plan, placement=placement))
        assert torch.equal(latents(streamed), made)


def test_the_plan_counts_eight_bits(tiny: Path, tmp_path: Path) -> None:
    save_file(old_style(weights_of(tiny)), tmp_path / "fp8.safetensors")
    plan, full = (load(tiny, file, "bfloat16").plan for file in (tmp_path / "fp8.safetensors", None))
    assert plan is not None
    assert full is not None
    rows = sum(one.shape[0] for name, one in weights_of(tiny).items() if in_blocks(name) and one.ndim == 2)
    numbers = sum(one.numel() for name, one in weights_of(tiny).items() if in_blocks(name) and one.ndim == 2)
    assert plan.sizes.packed == numbers + packed.SCALE * rows
    assert full.stages[2].device - plan.stages[2].device == numbers - packed.SCALE * rows


def test_what_is_asked_for_besides_leaves_them_as_they_are(tiny: Path, tmp_path: Path) -> None:
    save_file(old_style(weights_of(tiny)), tmp_path / "fp8.safetensors")
    pipe = load(tiny, tmp_path / "fp8.safetensors", weight_dtype="int8")
    assert {one.kind for one in pipe.transformer.modules() if hasattr(one, "kind")} == {"F8_E4M3"}
    assert torch.isfinite(latents(pipe)).all()
    plain = load(tiny, tmp_path / "fp8.safetensors")
    with pytest.raises(RequestError, match=r"stored in fp8, so it cannot be .*load it again without the FP8 file"):
        plain.to(torch.bfloat16)


def test_weights_in_full_with_a_scale_are_multiplied(tiny: Path, tmp_path: Path) -> None:
    """Files that ComfyUI saved from a model in 8 bits have a scale also for the layers that are not."""
    weights = published(weights_of(tiny))
    weights["layers.0.attention.out.scale_weight"] = torch.tensor(0.375)
    weights["layers.0.feed_forward.w1.scale_weight"] = torch.linspace(0.5, 2, 170)
    save_file(weights, tmp_path / "scaled.safetensors")
    layer = load(tiny, tmp_path / "scaled.safetensors").transformer.layers[0]
    assert torch.equal(layer.attention.to_out[0].weight, weights["layers.0.attention.out.weight"] * 0.375)
    factors = weights["layers.0.feed_forward.w1.scale_weight"][:, None]
    assert torch.equal(layer.feed_forward.w1.weight, weights["layers.0.feed_forward.w1.weight"] * factors)
    rounded = load(tiny, tmp_path / "scaled.safetensors", weight_dtype="int8").transformer.layers[0].feed_forward.w1
    wide = weights["layers.0.feed_forward.w1.weight"] * factors
    assert float((rounded.widened(torch.float32) - wide).abs().max() / wide.abs().max()) < 1 / 127


def change(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def changed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: one for key, one in {**weights, name: value}.items() if one is not None}

    return changed


LAYER = "layers.1.feed_forward.w2"
NOT_FINITE = rf"'{LAYER}\.weight' has values that are NaN or infinite"
NAN = torch.full((64, 170), torch.nan).to(torch.float8_e4m3fn)
WRONG = {
    "NaN in the weights": (change(f"{LAYER}.weight", NAN), NOT_FINITE),
    "NaN in an embedder": (
        change("x_embedder.weight", NAN[:, :64].contiguous()),
        r"x_embedder.2-1.weight' has values that are NaN or infinite",
    ),
    "an infinite scale": (change(f"{LAYER}.weight_scale", torch.tensor(torch.inf)), NOT_FINITE),
    "blocks of scales": (
        change(f"{LAYER}.weight_scale", torch.ones(2, 3)),
        rf"scales '{LAYER}\.weight' by F32 \[2, 3\]; read are one number .* 64 rows",
    ),
    "scales in eight bits": (
        change(f"{LAYER}.weight_scale", torch.ones(64).to(torch.float8_e8m0fnu)), r"by F8_E8M0 \[64\]",
    ),
    "two scales": (change(f"{LAYER}.scale_weight", torch.ones(())), rf"scales '{LAYER}\.weight' by F32"),
    "four bits": (
        change(f"{LAYER}.weight", torch.zeros(64, 85, dtype=torch.uint8)),
        rf"misshapen: '{LAYER}\.weight' .*weights quantised so",
    ),
    "a scale of nothing": (change("layers.0.nothing.weight_scale", torch.ones(())), "1 unexpected: 'layers.0.nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_refused(name: str, tiny: Path, tmp_path: Path) -> None:
    spoil, message = WRONG[name]
    save_file(spoil(new_style(weights_of(tiny))), tmp_path / "fp8.safetensors")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tiny, tmp_path / "fp8.safetensors")
    assert "fp8.safetensors" in str(caught.value)


def test_a_lora_is_no_transformer(tiny: Path, tmp_path: Path) -> None:
    for name in (
        "diffusion_model.layers.0.attention.qkv.lora_A.weight", "lora_unet_layers_0_attention_qkv.alpha",
        "layers.0.attention.to_q.lora.down.weight",
    ):  # fmt: skip
        save_file({name: torch.ones(4, 64)}, tmp_path / "ink.safetensors")
        with pytest.raises(
            CheckpointError, match=r"ink\.safetensors is a LoRA or the like and no transformer: .*--lora"
        ):
            load(tiny, tmp_path / "ink.safetensors")


@pytest.mark.parametrize("kind", packed.FLOATS)
def test_every_byte_is_widened_or_refused(kind: str) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 256)
    wide = values.view(packed.FLOATS[kind]).float()
    assert torch.equal(
        torch.tensor([packed.are_finite(one.view(1, 1), kind) for one in values[0]]), torch.isfinite(wide[0])
    )
    rows = packed.pack_floats(values.expand(3, 256), torch.tensor([[1.0], [0.25], [3.0]]))
    assert rows.shape == (3, packed.row_bytes(kind, 256))
    expected = wide * torch.tensor([[1.0], [0.25], [3.0]])
    assert torch.equal(packed.widen(rows, kind, torch.float32).nan_to_num(), expected.nan_to_num())
    assert torch.equal(packed.widen(rows[1:2], kind, torch.float32).nan_to_num(), expected[1:2].nan_to_num())
