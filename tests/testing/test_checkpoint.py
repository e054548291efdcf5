import filecmp
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM, Qwen3Model

from zimage.testing import build_checkpoint, checkpoint
from zimage.testing.checkpoint import _shards
from zimage.testing.configs import SIZES, text_encoder_config, transformer_config
from zimage.testing.weights import tensor_shapes

FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
COMPONENTS = ["text_encoder", "transformer", "vae"]


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_importing_loads_no_torch() -> None:
    code = "import sys, zimage.testing; sys.exit('torch' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_layout_is_the_hubs(tiny: Path) -> None:
    assert files(tiny) == FILES
    assert sum(path.stat().st_size for path in tiny.rglob("*")) < 5_000_000
    assert list(tiny.parent.iterdir()) == [tiny]


def test_the_model_index_is_the_hubs(tiny: Path) -> None:
    assert read(tiny / "model_index.json") == {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": "0.36.0.dev0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def test_variants_differ_in_the_shift_alone(tiny: Path, tmp_path: Path) -> None:
    base = build_checkpoint(tmp_path / "base", variant="base")
    assert read(tiny / "scheduler/scheduler_config.json")["shift"] == 3.0
    assert read(base / "scheduler/scheduler_config.json")["shift"] == 6.0
    same = [file for file in FILES if file.endswith(".safetensors") or file.startswith("tokenizer/")]
    assert filecmp.cmpfiles(tiny, base, same, shallow=False)[0] == same


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_global_generator(tiny: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    again = build_checkpoint(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    assert filecmp.cmpfiles(tiny, again, FILES, shallow=False) == (FILES, [], [])


@pytest.mark.parametrize("component", COMPONENTS)
def test_another_seed_changes_every_tensor(tiny: Path, tmp_path: Path, component: str) -> None:
    other = tensors(build_checkpoint(tmp_path / "other", seed=1) / component)
    for name, tensor in tensors(tiny / component).items():
        assert not torch.isclose(tensor, other[name], rtol=1e-6).all(), name


def test_a_lower_precision_is_the_rounded_float32(tiny: Path, tmp_path: Path) -> None:
    mixed = build_checkpoint(tmp_path / "mixed", dtype="bfloat16", transformer_dtype="float16")
    dtypes = {"text_encoder": torch.bfloat16, "transformer": torch.float16, "vae": torch.bfloat16}
    for component, dtype in dtypes.items():
        rounded = tensors(mixed / component)
        for name, tensor in tensors(tiny / component).items():
            assert torch.equal(rounded[name], tensor.to(dtype)), name
    assert read(mixed / "text_encoder/config.json")["torch_dtype"] == "bfloat16"


def test_shards_hold_the_same_tensors_under_an_index(tiny: Path, tmp_path: Path) -> None:
    sharded = build_checkpoint(tmp_path / "sharded", max_shard_size="250KB")
    for component, stem in (("text_encoder", "model"), ("transformer", "diffusion_pytorch_model")):
        whole = tensors(tiny / component)
        index = read(sharded / component / f"{stem}.safetensors.index.json")
        count = len(list((sharded / component).glob("*.safetensors")))
        assert count > 2
        names = {f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)}
        assert set(index["weight_map"].values()) == names
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
        for file in names:
            shard = load_file(sharded / component / file)
            assert set(shard) == {name for name, place in index["weight_map"].items() if place == file}
            assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 250_000
            assert all(torch.equal(tensor, whole.pop(name)) for name, tensor in shard.items())
        assert whole == {}
    assert files(sharded / "vae") == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_real_has_three_shards_of_transformer_and_text_encoder() -> None:
    real = SIZES["real"]
    text_encoder = text_encoder_config(real, "bfloat16", bos_token_id=0, eos_token_id=0)
    for component, config in (("transformer", transformer_config(real, "0")), ("text_encoder", text_encoder)):
        shapes = tensor_shapes(component, config)
        shards = _shards(shapes, real.shard_parameters[component])
        assert len(shards) == 3
        assert [name for shard in shards for name in shard] == list(shapes)


@pytest.mark.parametrize("max_shard_size", [None, 300_000])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_every_model_loads_strictly(tmp_path: Path, prefix: Any, max_shard_size: int | None) -> None:
    folder = build_checkpoint(tmp_path / "made", max_shard_size=max_shard_size, text_encoder_prefix=prefix)
    models: list[tuple[Any, str]] = [
        (Qwen3Model, "text_encoder"),
        (Qwen3ForCausalLM, "text_encoder"),
        (ZImageTransformer2DModel, "transformer"),
        (AutoencoderKL, "vae"),
    ]
    for model, component in models:
        loaded, info = model.from_pretrained(folder / component, output_loading_info=True)
        assert not any(info.values()), (model, info)
        state = loaded.state_dict()
        for name, tensor in tensors(folder / component).items():
            if component == "text_encoder":
                name = ("model." if model is Qwen3ForCausalLM else "") + name.removeprefix("model.")
            assert torch.equal(state.pop(name), tensor), name
        assert set(state) <= {"lm_head.weight"}


def test_text_encoder_names_follow_the_prefix_not_the_class(tiny: Path, tmp_path: Path) -> None:
    assert all(name.startswith("model.") for name in tensors(tiny / "text_encoder"))
    made = build_checkpoint(tmp_path / "made", text_encoder_class="Qwen3ForCausalLM", text_encoder_prefix="")
    assert read(made / "model_index.json")["text_encoder"] == ["transformers", "Qwen3ForCausalLM"]
    names = set(tensors(made / "text_encoder"))
    assert {"embed_tokens.weight", "norm.weight", "layers.2.mlp.down_proj.weight"} < names
    assert {f"model.{name}" for name in names} == set(tensors(tiny / "text_encoder"))
    assert "model.lm_head.weight" not in names | set(tensors(tiny / "text_encoder"))


def test_files_say_they_are_pytorchs(tiny: Path) -> None:
    for file in tiny.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_an_occupied_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        build_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"mine\.txt exists and is not an empty folder"):
        build_checkpoint(tmp_path / "mine.txt")
    assert files(tmp_path) == ["mine.txt"]


def test_an_empty_folder_and_a_deep_one_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_checkpoint(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert build_checkpoint("empty") == Path("empty")
    assert files(tmp_path / "a" / "b") == files(tmp_path / "empty") == FILES


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        build_checkpoint(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", "huge"),
        ("variant", "edit"),
        ("dtype", "float64"),
        ("transformer_dtype", "int8"),
        ("activations", "wild"),
        ("max_shard_size", "5 parsecs"),
        ("max_shard_size", 0),
        ("text_encoder_class", "Qwen3"),
        ("text_encoder_prefix", "encoder."),
    ],
)
def test_an_unknown_option_is_refused_before_anything_is_written(tmp_path: Path, option: str, value: Any) -> None:
    arguments: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=option):
        build_checkpoint(tmp_path / "made", **arguments)
    assert list(tmp_path.iterdir()) == []
