"""Every format is read as the same adapter; what does not fit is an error that says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from zimage.adapters.adapter import Adapter, Shape
from zimage.adapters.loading import load
from zimage.adapters.source import locate_adapter
from zimage.errors import AdapterError

SCALE = 0.5
Layers = Mapping[str, Shape]
Reference = dict[str, tuple[Tensor, Tensor]]
WriteLora = Callable[..., Path]


def read(path: Path | str, layers: Layers, **options: Any) -> Adapter:
    adapter, notices = load(locate_adapter(path, **options), layers, "turbo")
    assert notices == ()
    return adapter


def tensors_of(file: Path) -> dict[str, Tensor]:
    return load_file(file)


def test_every_format_is_the_same_adapter(in_format: Path, reference: Reference, layers: Layers) -> None:
    adapter = read(in_format, layers)
    assert set(adapter.deltas) == set(reference) == set(adapter.report.modules)
    assert len(adapter.report.matched) == len(tensors_of(in_format))
    assert adapter.report.unmatched == adapter.report.misshapen == ()
    for module, (down, up) in reference.items():
        delta = adapter.deltas[module]
        assert torch.equal(delta.scale * delta.up.double() @ delta.down.double(), SCALE * up.double() @ down.double())


def test_a_folder_is_its_file(in_format: Path, layers: Layers) -> None:
    assert read(in_format.parent, layers).digest == read(in_format, layers).digest


def test_the_digest_is_that_of_the_file(ink: Path, layers: Layers) -> None:
    import hashlib

    assert read(ink, layers).digest == hashlib.sha256(ink.read_bytes()).hexdigest()


@pytest.mark.parametrize("naming", ["peft", "dora_scale"])
def test_dora_has_the_length_of_rows(naming: str, reference: Reference, layers: Layers, write_lora: WriteLora) -> None:
    module = "layers.0.attention.to_q"
    down, up = reference[module]
    length = torch.rand(len(up)) + 0.5
    tensors = {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
    if naming == "peft":
        tensors[f"transformer.{module}.lora_magnitude_vector"] = length
    else:
        tensors[f"transformer.{module}.dora_scale"] = length[:, None]
    delta = read(write_lora(tensors), layers).deltas[module]
    assert delta.magnitude is not None
    assert torch.equal(delta.magnitude, length)


def test_fused_dora_is_split_with_its_rows(reference: Reference, layers: Layers, write_lora: WriteLora) -> None:
    down, up = reference["layers.1.attention.to_q"]
    stem = "diffusion_model.layers.1.attention.qkv"
    lengths = torch.arange(3.0 * len(up)) + 1
    tensors = {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": torch.cat([up, up, up]),
        f"{stem}.dora_scale": lengths[:, None],
    }
    deltas = read(write_lora(tensors), layers).deltas
    found = [deltas[f"layers.1.attention.{part}"].magnitude for part in ("to_q", "to_k", "to_v")]
    assert torch.equal(torch.cat([one for one in found if one is not None]), lengths)


def test_a_layer_that_a_file_has_twice_is_taken_on_its_own(
    reference: Reference, layers: Layers, write_lora: WriteLora
) -> None:
    """As some trainers write it: fused, and again split."""
    owner = "layers.0.attention"
    down, up = reference[f"{owner}.to_q"]
    tensors = {f"{owner}.qkv.lora.down.weight": down * 9, f"{owner}.qkv.lora.up.weight": torch.cat([up, up, up])}
    for part in ("to.q", "to.k", "to.v"):
        tensors |= {f"{owner}.{part}.lora.down.weight": down, f"{owner}.{part}.lora.up.weight": up}
    adapter, notices = load(locate_adapter(write_lora(tensors)), layers, "turbo")
    assert torch.equal(adapter.deltas[f"{owner}.to_q"].down, down)
    assert set(adapter.report.unmatched) == set(tuple(tensors)[:2])
    assert "of the keys in" in notices[0]


def test_what_does_not_act_is_reported_and_warned_of(
    reference: Reference, layers: Layers, write_lora: WriteLora
) -> None:
    module = "layers.0.feed_forward.w1"
    down, up = reference[module]
    tensors = {
        f"lora_unet_{module.replace('.', '_')}.lora_down.weight": down,
        f"lora_unet_{module.replace('.', '_')}.lora_up.weight": up,
        "lora_te_text_model_layers_0_mlp_fc1.lora_down.weight": down,
        "lora_unet_layers_99_feed_forward_w1.lora_down.weight": down,
    }
    adapter, notices = load(locate_adapter(write_lora(tensors)), layers, "turbo")
    assert adapter.report.modules == (module,)
    assert set(adapter.report.matched) == set(tuple(tensors)[:2])
    assert adapter.report.unmatched == tuple(tensors)[2:]
    (notice,) = notices
    assert "2 act; 1 are for a text encoder, which is not adapted and 1 are of no layer" in notice
    assert "layers_99" in notice
    assert str(adapter.report) == "2 keys matched, on 1 layers\n2 unmatched: " + ", ".join(
        repr(name) for name in tuple(tensors)[2:]
    )
    assert json.loads(json.dumps(adapter.report.to_dict()))["modules"] == [module]


SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
FLUX = "transformer.single_transformer_blocks.0.attn.to_q"
BAD: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "sdxl": (
        {f"{SDXL}.lora_down.weight": (4, 640), f"{SDXL}.lora_up.weight": (640, 4)},
        "one for Stable Diffusion; take",
    ),
    "flux": ({f"{FLUX}.lora_A.weight": (4, 3072), f"{FLUX}.lora_B.weight": (3072, 4)}, "looks like one for Flux; take"),
    "nothing": ({"step": ()}, "no LoRA for a layer of Z-Image: none of its 1 keys matches, such as 'step'"),
    "misshapen": (
        {"layers.0.attention.to_q.lora_A.weight": (4, 2304), "layers.0.attention.to_q.lora_B.weight": (2304, 4)},
        r"2 of its keys do not fit, such as 'layers.0.attention.to_q.lora_A.weight' \[4, 2304\] for \[4, 64\]",
    ),
    "ranks": (
        {"layers.0.attention.to_q.lora_A.weight": (4, 64), "layers.0.attention.to_q.lora_B.weight": (64, 8)},
        r"lora_B.weight' \[64, 8\] for \[64, 4\]",
    ),
    "flat": (
        {"layers.0.attention.to_q.lora_A.weight": (4,), "layers.0.attention.to_q.lora_B.weight": (64, 4)},
        r"\[4\] for \[4, 64\]",
    ),
    "half": ({"layers.0.attention.to_q.lora_A.weight": (4, 64)}, "to_q.lora_A.weight' without lora_up"),
    "columns": (
        {"layers.0.feed_forward.w1.lora_A.weight": (4, 64), "layers.0.feed_forward.w1.lora_B.weight": (170, 4),
         "layers.0.feed_forward.w1.dora_scale": (1, 64)},
        r"dora_scale' \[1, 64\] for \[170\]",
    ),
    "alpha": (
        {"layers.0.attention.to_q.lora_A.weight": (4, 64), "layers.0.attention.to_q.lora_B.weight": (64, 4),
         "layers.0.attention.to_q.alpha": (2,)},
        r"alpha' \[2\] for \[\]",
    ),
    "lokr": ({"diffusion_model.layers.0.attention.to_q.lokr_w1": (4, 4)}, "is a LoKr adapter; LoRA and DoRA are read"),
    "oft": ({"base_model.model.layers.0.attention.to_q.oft_R.weight": (4, 4)}, "is a OFT adapter"),
    "boft": ({"base_model.model.layers.0.attention.to_q.boft_R": (4, 4)}, "is a BOFT adapter"),
    "biases": (
        {"layers.0.attention.to_q.lora_A.weight": (4, 64), "layers.0.attention.to_q.lora_B.bias": (64,),
         "layers.0.attention.to_q.lora_B.weight": (64, 4)},
        "is a LoRA-with-biases adapter; LoRA and DoRA are read",
    ),
    "loha": ({"lycoris_layers_0_attention_to_q.hada_w1_a": (4, 4)}, "is a LoHa adapter"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_refused(kind: str, layers: Layers, write_lora: WriteLora) -> None:
    shapes, message = BAD[kind]
    file = write_lora({name: torch.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(AdapterError, match=message) as caught:
        read(file, layers)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "alpha"])
def test_values_that_are_not_finite_are_refused(
    part: str, value: float, reference: Reference, layers: Layers, write_lora: WriteLora
) -> None:
    down, up = (one.clone() for one in reference["layers.0.attention.to_q"])
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "alpha": torch.tensor(2.0)}
    tensors[part].view(-1)[-1] = value
    file = write_lora({f"layers.0.attention.to_q.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(AdapterError, match=f"{part}' has values that are NaN, or infinite in float32"):
        read(file, layers)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("alpha", 1e300, "alpha' has values that are NaN, or infinite in float32"),
        ("lora_B.weight", -1e39, "lora_B.weight' has values that are NaN, or infinite in float32"),
        ("alpha", 3e38, r"lora_A.weight' is not finite in float32 once it is multiplied by alpha / rank, 7.5e\+37"),
    ],
)
def test_what_is_not_finite_once_it_is_scaled_is_refused(
    part: str, value: float, said: str, layers: Layers, write_lora: WriteLora
) -> None:
    tensors = {
        "lora_A.weight": torch.full((4, 64), 9.0),
        "lora_B.weight": torch.ones(64, 4),
        "alpha": torch.tensor(2.0),
    }
    tensors[part] = torch.full_like(tensors[part], value, dtype=torch.float64)
    file = write_lora({f"layers.0.attention.to_q.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(AdapterError, match=said):
        read(file, layers)


def test_damaged_files_are_refused(ink: Path, layers: Layers, tmp_path: Path) -> None:
    whole = ink.read_bytes()
    for content, message in (
        (whole[:-1], "is not a whole safetensors file: its tensors end at byte"),
        (whole[:100], "is not a whole safetensors file: its header should have"),
        (whole + b"\0", "is not a whole safetensors file"),
        (b"", "is not a whole safetensors file: it is empty"),
        (b"PK\3\4" + whole, "is not a whole safetensors file"),
    ):
        file = tmp_path / "damaged.safetensors"
        file.write_bytes(content)
        with pytest.raises(AdapterError, match=message):
            read(file, layers)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_alpha_may_be_a_whole_number(
    dtype: torch.dtype, reference: Reference, layers: Layers, write_lora: WriteLora
) -> None:
    """As kohya's scripts write it where the option is one."""
    stem, (down, up) = "lora_unet_layers_0_attention_to_q", reference["layers.0.attention.to_q"]
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    adapter = read(write_lora({**tensors, f"{stem}.alpha": torch.tensor(3, dtype=dtype)}), layers)
    assert adapter.deltas["layers.0.attention.to_q"].scale == 3 / len(down)


def test_other_types_are_refused(layers: Layers, write_lora: WriteLora) -> None:
    stem = "layers.0.attention.to_q"
    file = write_lora({f"{stem}.lora_A.weight": torch.zeros(4, 64, dtype=torch.int8)})
    with pytest.raises(AdapterError, match="of the type I8; LoRAs are read in F64, F32, F16, BF16, only alpha may be"):
        read(file, layers)
    with pytest.raises(AdapterError, match="alpha' is of the type BOOL"):
        read(write_lora({f"{stem}.alpha": torch.tensor(True)}), layers)
    one = {f"{stem}.lora_A.weight": torch.ones(1, 1, dtype=torch.int8), f"{stem}.lora_B.weight": torch.ones(1, 1)}
    with pytest.raises(AdapterError, match=r"lora_A.weight' is of the type torch\.int8; take a file in float16"):
        read(write_lora(one), {stem: (1, 1)})


def test_metadata_of_another_architecture_is_an_error(
    reference: Reference, layers: Layers, write_lora: WriteLora
) -> None:
    down, up = reference["layers.0.attention.to_q"]
    tensors = {"layers.0.attention.to_q.lora_A.weight": down, "layers.0.attention.to_q.lora_B.weight": up}
    for metadata, name in (
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "Stable Diffusion XL"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "Stable Diffusion XL"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "Flux"),
        ({"ss_base_model_version": "qwen_image"}, "Qwen-Image"),
        ({"ss_base_model_version": "lumina2"}, "Lumina"),
    ):
        with pytest.raises(AdapterError, match=f"was made for {name}, as its metadata says"):
            read(write_lora(tensors, metadata), layers)


def test_metadata_of_the_other_variant_is_a_warning(
    reference: Reference, layers: Layers, write_lora: WriteLora
) -> None:
    down, up = reference["layers.0.attention.to_q"]
    tensors = {"layers.0.attention.to_q.lora_A.weight": down, "layers.0.attention.to_q.lora_B.weight": up}

    def heard(variant: str, metadata: dict[str, str], config: dict[str, Any] | None = None) -> tuple[str, ...]:
        name = "lora.safetensors" if config is None else "adapter_model.safetensors"
        return load(locate_adapter(write_lora(tensors, metadata, config, name)), layers, variant)[1]

    (notice,) = heard("turbo", {"ss_base_model_version": "z-image-base"})
    assert "was trained for base, as its metadata says, and this model is turbo" in notice
    (notice,) = heard("turbo", {}, {"base_model_name_or_path": "Tongyi-MAI/Z-Image"})
    assert "was trained for base" in notice
    (notice,) = heard("base", {"modelspec.architecture": "Z-Image-Turbo/lora"})
    assert "was trained for turbo, as its metadata says, and this model is base" in notice
    assert heard("turbo", {"ss_base_model_version": "zimage:turbo"}) == ()
    assert heard("base", {"ss_base_model_version": "zimage"}) == ()
    assert heard("base", {"ss_sd_model_name": "Z-Image-De-Turbo"}) == ()


def test_what_is_not_there_or_no_lora_is_refused(tmp_path: Path, ink: Path) -> None:
    (tmp_path / "empty").mkdir()
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (two / name).write_bytes(ink.read_bytes())
    pickled = tmp_path / "lora.pt"
    pickled.write_bytes(b"\x80")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "missing.safetensors", {}, "cannot find the LoRA"),
        ("no such lora", {}, "no such file or folder here, and it is no hub id"),
        (7, {}, "is a file, a folder or a hub id, got 7"),
        ({"x.lora_A.weight": torch.ones(1)}, {}, "got a state dict; write that with safetensors.torch.save_file"),
        (pickled, {}, "pickles .* are never read"),
        (tmp_path / "empty", {}, "should hold one LoRA and has no .safetensors file"),
        (two, {}, "should hold one LoRA and has a.safetensors, b.safetensors; name the file with weight_name"),
        (two, {"weight_name": "c.safetensors"}, "has no c.safetensors"),
        (two, {"weight_name": "a.bin"}, "read from a .safetensors file, got 'a.bin'"),
        (ink, {"weight_name": "ink.safetensors"}, "is a file, so weight_name"),
        ("someone/lora", {"local_files_only": True}, "someone/lora is not in the cache"),
        ("someone/lora/x.safetensors", {"local_files_only": True}, "x.safetensors of someone/lora is not in the cache"),
    ]
    for source, options, message in cases:
        with pytest.raises(AdapterError, match=message):
            locate_adapter(source, **{"cache_dir": tmp_path / "cache", **options})
    assert locate_adapter(two, weight_name="b.safetensors").file == two / "b.safetensors"


def test_a_path_that_leads_nowhere_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loras" / "style").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source, message in (
        ("loras/ink.safetensors", "cannot find the LoRA 'loras/ink.safetensors': there is no such file"),
        ("elsewhere/ink.safetensors", "cannot find the LoRA 'elsewhere/ink.safetensors'"),
        ("loras/style/ink.safetensors", "cannot find the LoRA 'loras/style/ink.safetensors'"),
        ("loras/flat/ink.safetensors", "is not in the cache .* There is no loras/flat/ink.safetensors on this machine"),
        ("someone/flat/ink.safetensors", "ink.safetensors of someone/flat is not in the cache .* that has it$"),
    ):
        with pytest.raises(AdapterError, match=message):
            locate_adapter(source, cache_dir=".", local_files_only=True)


def test_a_hub_id_is_its_file_in_the_cache(ink: Path, tmp_path: Path, layers: Layers) -> None:
    """As huggingface_hub lays its cache out."""
    commit = "0123456789012345678901234567890123456789"
    repository = tmp_path / "models--someone--ink"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("pytorch_lora_weights.safetensors", "other.safetensors"):
        (snapshot / name).write_bytes(ink.read_bytes())
    for source, weight_name, name in (
        ("someone/ink", None, "someone/ink/pytorch_lora_weights.safetensors"),
        ("someone/ink", "other.safetensors", "someone/ink/other.safetensors"),
        ("someone/ink/other.safetensors", None, "someone/ink/other.safetensors"),
    ):
        found = locate_adapter(source, weight_name=weight_name, cache_dir=tmp_path, local_files_only=True)
        assert found.name == name
        assert load(found, layers, "turbo")[0].source == name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": "4"}, "the alpha of 'lora_alpha' must be a number, got '4'"),
        ({"alpha_pattern": {"to_q": True}}, "the alpha of 'to_q' must be a number"),
        ({"alpha_pattern": [1]}, "alpha_pattern must say the alpha of layers by name"),
        ({"alpha_pattern": {"(a+)+$": 1.0}}, "is read by plain names only"),
    ],
)
def test_configs_are_checked(
    config: dict[str, Any], message: str, reference: Reference, layers: Layers, write_lora: WriteLora
) -> None:
    down, up = reference["layers.0.attention.to_q"]
    tensors = {"layers.0.attention.to_q.lora_A.weight": down, "layers.0.attention.to_q.lora_B.weight": up}
    with pytest.raises(AdapterError, match=message):
        read(write_lora(tensors, None, config, "adapter_model.safetensors"), layers)
