from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage.checkpoint.load import Components, load_components
from zimage.models.transformer import ZImageTransformer
from zimage.testing import build_checkpoint

CPU = torch.device("cpu")
PARTS = ("transformer", "text_encoder", "vae")
FILES = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def state(components: Components, part: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = getattr(components, part).state_dict()
    return tensors


def same(one: Components, other: Components) -> bool:
    return all(
        list(state(one, part)) == list(state(other, part))
        and all(torch.equal(tensor, state(other, part)[name]) for name, tensor in state(one, part).items())
        for part in PARTS
    )


def edit(path: Path, **changes: Any) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Components:
    return load_components(tiny, dtype=torch.float32, device=CPU)


def test_the_classes_are_the_known_ones_and_ready_for_inference(loaded: Components, tiny: Path) -> None:
    kinds = [type(getattr(loaded, part)).__name__ for part in (*PARTS, "tokenizer")]
    assert kinds == ["ZImageTransformer", "Qwen3Model", "AutoencoderKL", "Qwen2Tokenizer"]
    assert isinstance(loaded.transformer, ZImageTransformer)
    assert loaded.folder == tiny
    assert loaded.shift == 3.0
    for part in PARTS:
        module = getattr(loaded, part)
        assert not any(child.training for child in module.modules())
        for tensor in (*module.parameters(), *module.buffers()):
            assert tensor.device == CPU
            assert not tensor.requires_grad
            assert not tensor.is_inference()
            assert tensor.data_ptr() % 16 == 0
        assert {tensor.dtype for tensor in module.parameters()} == {torch.float32}


def test_no_two_tensors_share_memory(loaded: Components) -> None:
    places = [tensor.untyped_storage().data_ptr() for part in PARTS for tensor in state(loaded, part).values()]
    assert len(set(places)) == len(places)


def test_weights_are_those_that_diffusers_loads(loaded: Components, tiny: Path) -> None:
    from diffusers import ZImagePipeline

    theirs = ZImagePipeline.from_pretrained(tiny, local_files_only=True)
    for part in ("transformer", "vae"):
        expected = getattr(theirs, part).state_dict()
        assert list(expected) == list(state(loaded, part))
        assert all(torch.equal(expected[name], tensor) for name, tensor in state(loaded, part).items())
        assert dict(getattr(theirs, part).config).items() >= _init(getattr(loaded, part)).items()
    expected = theirs.text_encoder.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in state(loaded, "text_encoder").items())
    assert {name.split(".")[1] for name in set(expected) - set(state(loaded, "text_encoder"))} == {"2", "weight"}
    assert theirs.scheduler.config.shift == loaded.shift
    text = "<|im_start|>user\nein Fuchs 狐狸<|im_end|>\n"
    assert loaded.tokenizer(text)["input_ids"] == theirs.tokenizer(text)["input_ids"]


def test_text_encoder_gives_the_hidden_state_before_the_last_layer(loaded: Components, tiny: Path) -> None:
    from transformers import Qwen3Model

    whole = Qwen3Model.from_pretrained(tiny / "text_encoder").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = whole(ids, output_hidden_states=True).hidden_states[-2]
        features = loaded.text_encoder(ids).last_hidden_state
    assert torch.equal(features, expected)
    assert loaded.text_encoder_layers == len(whole.layers) == len(loaded.text_encoder.layers) + 1
    assert loaded.text_encoder.config._attn_implementation == "sdpa"
    assert loaded.text_encoder.rotary_emb.inv_freq.dtype == torch.float32


def _init(module: Any) -> dict[str, Any]:
    return {key: value for key, value in module.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shards_of_any_type_become_the_wanted_one(dtype: torch.dtype, loaded: Components, tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "sharded", max_shard_size="500KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 3
    components = load_components(folder, dtype=dtype, device=CPU)
    for part in PARTS:
        for name, tensor in state(components, part).items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, state(loaded, part)[name].to(dtype))


def test_half_precision_files_widen(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "half", dtype="bfloat16", transformer_dtype="float16")
    components = load_components(folder, dtype=torch.float32, device=CPU)
    for part in PARTS:
        tensors = load_file(folder / FILES[part])
        prefix = "model." * (part == "text_encoder")
        assert all(
            torch.equal(tensor, tensors[prefix + name].float()) for name, tensor in state(components, part).items()
        )


def test_tensors_larger_than_a_piece_are_read_whole(
    loaded: Components, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zimage.checkpoint.tensors.CHUNK", 1000)
    assert same(load_components(tiny, dtype=torch.float32, device=CPU), loaded)
    narrow = load_components(tiny, dtype=torch.bfloat16, device=CPU)
    name = "layers.0.attention.to_q.weight"
    assert torch.equal(state(narrow, "transformer")[name], state(loaded, "transformer")[name].bfloat16())


@pytest.mark.parametrize("options", [{"text_encoder_class": "Qwen3ForCausalLM"}, {"text_encoder_prefix": ""}])
def test_either_form_of_the_text_encoder(options: dict[str, Any], loaded: Components, tmp_path: Path) -> None:
    assert same(
        load_components(build_checkpoint(tmp_path / "other", **options), dtype=torch.float32, device=CPU), loaded
    )


def test_a_language_model_with_its_head(loaded: Components, copy: Path) -> None:
    path = copy / FILES["text_encoder"]
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    assert same(load_components(copy, dtype=torch.float32, device=CPU), loaded)


def test_the_last_layer_may_be_absent_and_is_never_read(loaded: Components, copy: Path) -> None:
    path = copy / FILES["text_encoder"]
    tensors = load_file(path)
    for name in tensors:
        if name.startswith("model.layers.2.") or name == "model.norm.weight":
            tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, path)
    assert same(load_components(copy, dtype=torch.float32, device=CPU), loaded)
    save_file({name: tensor for name, tensor in tensors.items() if tensor.isfinite().all()}, path)
    assert same(load_components(copy, dtype=torch.float32, device=CPU), loaded)


def test_a_cache_of_links_loads(loaded: Components, tiny: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    for number, path in enumerate(path for path in sorted(tiny.rglob("*")) if path.is_file()):
        shutil.copy(path, blobs / f"{number:040x}")
        link = snapshot / path.relative_to(tiny)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "/".join([".."] * (len(path.relative_to(tiny).parts) + 1))
        link.symlink_to(f"{up}/blobs/{number:040x}")
    assert same(load_components(snapshot, dtype=torch.float32, device=CPU), loaded)


def test_both_spellings_of_the_rotary_base(loaded: Components, copy: Path) -> None:
    config = copy / "text_encoder" / "config.json"
    expected = loaded.text_encoder.rotary_emb.inv_freq
    edit(config, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, rope_theta=None)
    assert torch.equal(load_components(copy, dtype=torch.float32).text_encoder.rotary_emb.inv_freq, expected)
    edit(config, rope_parameters=None, rope_theta=10000)
    assert not torch.equal(load_components(copy, dtype=torch.float32).text_encoder.rotary_emb.inv_freq, expected)


def test_what_a_config_asks_for_beyond_the_architecture_is_not_passed_on(loaded: Components, copy: Path) -> None:
    edit(
        copy / "text_encoder" / "config.json",
        _attn_implementation="someone/kernel:function",
        attn_implementation="someone/kernel",
        torch_dtype="float64",
        output_attentions=True,
        chunk_size_feed_forward=7,
        name_or_path="/etc",
        pruned_heads={"0": [0]},
    )
    components = load_components(copy, dtype=torch.float32, device=CPU)
    assert same(components, loaded)
    assert components.text_encoder.config.to_dict() == loaded.text_encoder.config.to_dict()
    assert components.text_encoder.config._attn_implementation == "sdpa"


def test_a_tokenizer_without_its_combined_file(loaded: Components, copy: Path) -> None:
    text = "<|im_start|>user\na fox 一只红色的狐狸<|im_end|>\n<think>"
    (copy / "tokenizer" / "tokenizer.json").unlink()
    tokenizer = load_components(copy, dtype=torch.float32, device=CPU).tokenizer
    assert tokenizer(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]


def test_a_tokenizer_knows_where_it_is_from_and_neither_cuts_nor_fills(loaded: Components, copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer.json"
    cutting = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    filling = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    edit(path, truncation=cutting, padding=filling | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"})
    tokenizer = load_components(copy, dtype=torch.float32, device=CPU).tokenizer
    assert tokenizer.name_or_path == str(copy / "tokenizer")
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.padding is None
    text = "a red fox " * 20
    assert tokenizer(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]


def test_a_template_in_its_own_file(copy: Path) -> None:
    config = copy / "tokenizer" / "tokenizer_config.json"
    template = json.loads(config.read_text())["chat_template"]
    edit(config, chat_template=None)
    (copy / "tokenizer" / "chat_template.jinja").write_text(template)
    assert load_components(copy, dtype=torch.float32).tokenizer.chat_template == template


def test_nothing_is_said(
    tiny: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    caplog.set_level(logging.DEBUG)
    generator = torch.random.get_rng_state()
    load_components(tiny, dtype=torch.bfloat16, device=CPU)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not recwarn.list
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_weights_loaded_in_inference_mode_can_be_used_outside_of_it(tiny: Path) -> None:
    with torch.inference_mode():
        components = load_components(tiny, dtype=torch.float32, device=CPU)
    assert not any(tensor.is_inference() for part in PARTS for tensor in state(components, part).values())


def test_an_interrupt_passes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for place in ("load.fill", "tokenizer._build", "survey.build"):
        with monkeypatch.context() as patch:
            patch.setattr(f"zimage.checkpoint.{place}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                load_components(tiny, dtype=torch.float32, device=CPU)


_MEASURE = """
import resource, sys, torch
from zimage.checkpoint.load import load_components
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
before = peak()
components = load_components(sys.argv[1], dtype=torch.bfloat16, device=torch.device("cpu"))
modules = (components.transformer, components.text_encoder, components.vae)
weights = sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())
print(before, peak(), weights)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_peak_memory_is_that_of_the_weights_in_their_final_type(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "small", size="small", transformer_dtype="float32", max_shard_size="100MB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    command = [sys.executable, "-c", _MEASURE, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    before, peak, weights = map(int, run.stdout.split())
    assert weights > 200 << 20
    assert peak - before - weights < 64 << 20  # measured: 12 MiB
