"""Damaged and hostile folders: each is refused by name, and nothing in it is run, imported, unpickled or waited for."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage.checkpoint.inspect import inspect_checkpoint
from zimage.checkpoint.load import load_components
from zimage.checkpoint.survey import Survey, survey
from zimage.errors import CheckpointError

Mutation = Callable[[Path], None]

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
TRANSFORMER, TEXT_ENCODER, VAE = (f"{part}/config.json" for part in ("transformer", "text_encoder", "vae"))
TOKENIZER, SETTINGS = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
QWEN = "text_encoder/model.safetensors"
SHARDS = f"{WEIGHTS}.index.json"
MATRIX = "layers.1.feed_forward.w2.weight"
ALLOWED = (".json", ".safetensors", ".jinja", ".txt")
DANGEROUS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "ctypes.dlopen",
)


class Watch:
    """What the interpreter did with files of a folder, and beyond the process, while it was watched."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event.startswith("socket.") or event in DANGEROUS:
            self.seen.append(f"{event} {args!r}")
        elif event == "exec" and self._inside(getattr(args[0], "co_filename", None)):
            self.seen.append(f"exec {args[0].co_filename}")
        elif event in ("import", "compile") and self._inside(args[1]):
            self.seen.append(f"{event} {args[1]!r}")
        elif event == "open" and self._inside(args[0]) and not str(args[0]).endswith(ALLOWED):
            self.seen.append(f"open {args[0]!r}")

    def _inside(self, name: object) -> bool:
        return self.folder is not None and str(name).startswith(self.folder)


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(autouse=True)
def _impatient() -> Iterator[None]:
    """Nothing here may wait for a pipe or a device."""

    def late(*_: object) -> None:
        raise TimeoutError("waited for a file that will never come")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.trace)!r}, 'w').close()",))


def plant(folder: Path, trace: Path) -> None:
    """Code and pickles with the names that someone might import or load."""
    code = f"open({str(trace)!r}, 'w').close()\n"
    for name in (
        *(
            "pipeline.py",
            "transformers.py",
            "diffusers.py",
            "safetensors.py",
            "torch.py",
            "evil.py",
            "sitecustomize.py",
        ),
        *("transformer/modeling_evil.py", "transformer/evil.py", "text_encoder/modeling_qwen3.py", "__init__.py"),
        *("tokenizer/tokenization_evil.py", "tokenizer/tokenization_qwen2.py", "vae/autoencoder_kl.py"),
    ):
        (folder / name).write_text(code)
    for name in ("pickled.pkl", "transformer/weights.bin", "text_encoder/pytorch_model.bin", "vae/training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(trace)))


def put(name: str, content: str | bytes) -> Mutation:
    """The file holds something else."""

    def mutate(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return mutate


def edit(name: str, **changes: Any) -> Mutation:
    """Keys of a JSON file are set; `...` removes one."""

    def mutate(folder: Path) -> None:
        config = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return mutate


def raw(name: str, key: str, text: str) -> Mutation:
    """One value of a JSON file is replaced by a text that Python would not write."""

    def mutate(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        config[key] = "@"
        (folder / name).write_text(json.dumps(config).replace('"@"', text))

    return mutate


def remove(*names: str) -> Mutation:
    def mutate(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return mutate


def instead(name: str, make: Callable[[Path], object]) -> Mutation:
    """Something that is no file takes the place of one."""

    def mutate(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return mutate


def tensor(name: str, value: torch.Tensor | None, file: str = WEIGHTS) -> Mutation:
    """A tensor is added, replaced, or with None taken out."""

    def mutate(folder: Path) -> None:
        found = {**load_file(folder / file), name: value}
        save_file({key: kept for key, kept in found.items() if kept is not None}, folder / file)

    return mutate


def last_value(value: float) -> Mutation:
    """The last value of a tensor is another."""

    def mutate(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        found[MATRIX].view(-1)[-1] = value
        save_file(found, folder / WEIGHTS)

    return mutate


def header(name: str, **changes: Any) -> Mutation:
    """What the header of the weights says of a tensor is changed, their data is not."""

    def mutate(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        described = json.loads(content[8:end])
        described[name] = {**described[name], **changes}
        text = json.dumps(described).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[end:])

    return mutate


def headed(text: bytes, length: int | None = None) -> Mutation:
    """The weights are a header of this text alone."""
    return put(WEIGHTS, struct.pack("<Q", len(text) if length is None else length) + text)


def resized(name: str, by: int) -> Mutation:
    def mutate(folder: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size + by)

    return mutate


def copied(source: str, target: str) -> Mutation:
    def mutate(folder: Path) -> None:
        shutil.copy(folder / source, folder / target)

    return mutate


def sharded(*then: Mutation, **places: Any) -> Mutation:
    """The transformer is in the shards a and b; `places` is what the index says of some tensors, `...` nothing."""

    def mutate(folder: Path) -> None:
        whole = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(whole)
        weight_map: dict[str, Any] = {}
        for shard, part in (("a.safetensors", names[:40]), ("b.safetensors", names[40:])):
            save_file({name: whole[name] for name in part}, folder / "transformer" / shard)
            weight_map.update(dict.fromkeys(part, shard))
        weight_map.update(places)
        listed = {name: shard for name, shard in weight_map.items() if shard is not ...}
        (folder / SHARDS).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
        for mutation in then:
            mutation(folder)

    return mutate


def in_turn(*mutations: Mutation) -> Mutation:
    def mutate(folder: Path) -> None:
        for one in mutations:
            one(folder)

    return mutate


def template(text: str) -> Mutation:
    """The chat template has the right marks and this."""
    return edit(SETTINGS, chat_template=f"<|im_start|>{text}<|im_end|>")


def bpe(**changes: Any) -> Mutation:
    return edit(TOKENIZER, model={"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [], **changes})


def marks(kept: int, **changes: Any) -> Mutation:
    """The tokenizer has the first `kept` of its added tokens, and they are changed; its config does not repeat them."""

    def mutate(folder: Path) -> None:
        whole = json.loads((folder / TOKENIZER).read_text())
        whole["added_tokens"] = [{**token, **changes} for token in whole["added_tokens"][:kept]]
        (folder / TOKENIZER).write_text(json.dumps(whole))
        edit(SETTINGS, added_tokens_decoder=..., additional_special_tokens=..., eos_token=None)(folder)

    return mutate


def older(name: str, content: dict[str, Any]) -> Mutation:
    """The tokenizer is in its older form, with a file that belongs to it."""
    decoder = edit(SETTINGS, added_tokens_decoder=...)
    return in_turn(remove(TOKENIZER), decoder, put(f"tokenizer/{name}", json.dumps(content)))


TEMPLATE = "<|im_start|>{{ messages }}<|im_end|>"
ADDS_TOKENS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
}

CASES: dict[str, tuple[str, Mutation]] = {
    # model_index.json: what stands in a message, and what was done to the folder
    "index missing": (INDEX, remove(INDEX)),
    "index empty": (INDEX, put(INDEX, "")),
    "index not json": (INDEX, put(INDEX, "import os")),
    "index a list": (INDEX, put(INDEX, "[]")),
    "index binary": (INDEX, put(INDEX, b"\x80\x04\x95\xff")),
    "index with a byte order mark": (INDEX, put(INDEX, b"\xef\xbb\xbf{}")),
    "index a pickle": (INDEX, copied("pickled.pkl", INDEX)),
    "index too large": ("bytes, at most 1048576", resized(INDEX, 2 << 20)),
    "index nested deeply": ("nested too deeply", put(INDEX, "[" * 200_000)),
    "index objects nested deeply": (INDEX, put(INDEX, '{"a":' * 100_000 + "1" + "}" * 100_000)),
    "index with doubled keys": ("occurs twice", put(INDEX, '{"_class_name": "ZImagePipeline", "_class_name": "Evil"}')),
    "index a folder": ("got a folder", instead(INDEX, Path.mkdir)),
    "index a pipe": ("got a pipe, socket or device", instead(INDEX, os.mkfifo)),
    "index a device": ("got a pipe, socket or device", instead(INDEX, lambda path: path.symlink_to("/dev/zero"))),
    "index a dead link": (
        "is a link to a file that is not there",
        instead(INDEX, lambda path: path.symlink_to("gone")),
    ),
    "index a loop of links": (INDEX, instead(INDEX, lambda path: path.symlink_to(INDEX))),
    "another pipeline": ("'FluxPipeline'", edit(INDEX, _class_name="FluxPipeline")),
    "a pipeline of the folder": ("['pipeline', 'Evil']", edit(INDEX, _class_name=["pipeline", "Evil"])),
    "a class of the folder": ("['evil', 'ZImage", edit(INDEX, transformer=["evil", "ZImageTransformer2DModel"])),
    "another transformer": ("'FluxTransformer", edit(INDEX, transformer=["diffusers", "FluxTransformer2DModel"])),
    "another text encoder": ("'T5EncoderModel'", edit(INDEX, text_encoder=["transformers", "T5EncoderModel"])),
    "another tokenizer": ("'AutoTokenizer'", edit(INDEX, tokenizer=["transformers", "AutoTokenizer"])),
    "another scheduler": ("'DDIMScheduler'", edit(INDEX, scheduler=["diffusers", "DDIMScheduler"])),
    "no vae": ("vae must be", edit(INDEX, vae=[None, None])),
    "a vae that is a number": ("vae must be", edit(INDEX, vae=7)),
    "one component more": ("'safety_checker'", edit(INDEX, safety_checker=["evil", "Checker"])),
    "index with auto_map": ("auto_map", edit(INDEX, auto_map={"AutoModel": "evil.Model"})),
    "index with a custom pipeline": ("custom_pipeline", edit(INDEX, custom_pipeline="evil")),
    # the scheduler
    "scheduler missing": (SCHEDULER, remove("scheduler")),
    "shift not a number": ("NaN is not a JSON number", raw(SCHEDULER, "shift", "NaN")),
    "shift infinite": ("shift must be", raw(SCHEDULER, "shift", "1e999")),
    "shift of many digits": (SCHEDULER, raw(SCHEDULER, "shift", "9" * 5000)),
    "shift zero": ("shift must be", edit(SCHEDULER, shift=0)),
    "shift negative": ("shift must be", edit(SCHEDULER, shift=-3.0)),
    "shift text": ("shift must be", edit(SCHEDULER, shift="3.0")),
    "shift true": ("shift must be", edit(SCHEDULER, shift=True)),
    "shift missing": ("shift is missing", edit(SCHEDULER, shift=...)),
    "shift dynamic": ("use_dynamic_shifting", edit(SCHEDULER, use_dynamic_shifting=True)),
    "karras sigmas": ("use_karras_sigmas", edit(SCHEDULER, use_karras_sigmas=True)),
    "exponential sigmas": ("use_exponential_sigmas", edit(SCHEDULER, use_exponential_sigmas=True)),
    "beta sigmas": ("use_beta_sigmas", edit(SCHEDULER, use_beta_sigmas=True)),
    "inverted sigmas": ("invert_sigmas", edit(SCHEDULER, invert_sigmas=True)),
    "terminal shift": ("shift_terminal", edit(SCHEDULER, shift_terminal=0.02)),
    "stochastic sampling": ("stochastic_sampling", edit(SCHEDULER, stochastic_sampling=True)),
    "another count of timesteps": ("num_train_timesteps", edit(SCHEDULER, num_train_timesteps=500)),
    "an option of another time": ("'use_evil_sigmas'", edit(SCHEDULER, use_evil_sigmas=True)),
    # configs of the models
    "transformer config missing": (TRANSFORMER, remove(TRANSFORMER)),
    "a billion layers": ("n_layers must be", edit(TRANSFORMER, n_layers=10**9)),
    "negative layers": ("n_layers must be", edit(TRANSFORMER, n_layers=-1)),
    "layers in words": ("n_layers must be", edit(TRANSFORMER, n_layers="2")),
    "layers true": ("n_layers must be", edit(TRANSFORMER, n_layers=True)),
    "layers in halves": ("n_layers must be", edit(TRANSFORMER, n_layers=2.5)),
    "a width of a trillion": ("dim must be", edit(TRANSFORMER, dim=2**40)),
    "widths that do not divide": ("axes_dims must add up", edit(TRANSFORMER, dim=63)),
    "no heads": ("n_heads must be", edit(TRANSFORMER, n_heads=0)),
    "other key heads": ("n_kv_heads must be n_heads", edit(TRANSFORMER, n_kv_heads=2)),
    "axes of other sum": ("axes_dims must add up", edit(TRANSFORMER, axes_dims=[4, 6, 8])),
    "odd axes": ("axes_dims must be", edit(TRANSFORMER, axes_dims=[3, 7, 6])),
    "two axes": ("axes_dims must be", edit(TRANSFORMER, axes_dims=[8, 8])),
    "nested axes": ("axes_dims must be", edit(TRANSFORMER, axes_dims=[[4], 6, 6])),
    "long axes": ("axes_lens must be", edit(TRANSFORMER, axes_lens=[10**12, 512, 512])),
    "another patch size": ("all_patch_size must be [2]", edit(TRANSFORMER, all_patch_size=[2, 4])),
    "patches of frames": ("all_f_patch_size must be [1]", edit(TRANSFORMER, all_f_patch_size=[2])),
    "another model with pictures in": ("siglip_feat_dim must be null", edit(TRANSFORMER, siglip_feat_dim=1152)),
    "epsilon zero": ("norm_eps must be", edit(TRANSFORMER, norm_eps=0)),
    "unknown keys": ("2 unknown keys: 'evil', 'quant", edit(TRANSFORMER, evil=1, quantization_config={"a": 1})),
    "transformer with auto_map": ("auto_map", edit(TRANSFORMER, auto_map={"AutoModel": "modeling_evil.Evil"})),
    "auto_map further in": ("auto_map", edit(VAE, _note=[{"auto_map": "autoencoder_kl.Evil"}])),
    "code to trust": ("trust_remote_code", edit(TEXT_ENCODER, trust_remote_code=True)),
    "captions of another width": ("cap_feat_dim must be the text_encoder's", edit(TRANSFORMER, cap_feat_dim=65)),
    "more layers than weights": ("missing: 'layers.2.", edit(TRANSFORMER, n_layers=3)),
    "fewer layers than weights": ("unexpected: 'layers.1.", edit(TRANSFORMER, n_layers=1)),
    "a config of another class": ("_class_name must be", edit(TRANSFORMER, _class_name="FluxTransformer2DModel")),
    "another language model": ("model_type must be 'qwen3'", edit(TEXT_ENCODER, model_type="llama")),
    "qwen with auto_map": ("auto_map", edit(TEXT_ENCODER, auto_map={"AutoModel": "modeling_qwen3.Evil"})),
    "a sliding window": ("use_sliding_window must be false", edit(TEXT_ENCODER, use_sliding_window=True)),
    "sliding layers": ("layer_types", edit(TEXT_ENCODER, layer_types=["sliding_attention"] * 3)),
    "quantised qwen": ("quantization_config", edit(TEXT_ENCODER, quantization_config={"quant_method": "evil"})),
    "another activation": ("hidden_act must be 'silu'", edit(TEXT_ENCODER, hidden_act="gelu")),
    "stretched positions": ("rope_scaling must be", edit(TEXT_ENCODER, rope_scaling={"type": "yarn", "factor": 4})),
    "two rotary bases": ("rope_theta is given twice", edit(TEXT_ENCODER, rope_parameters={"rope_theta": 5.0})),
    "no rotary base": ("rope_theta is missing", edit(TEXT_ENCODER, rope_theta=...)),
    "half a rotary embedding": (
        "rope_parameters must be",
        edit(TEXT_ENCODER, rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
    ),
    "odd head": ("head_dim must be even", edit(TEXT_ENCODER, head_dim=15)),
    "one layer": ("num_hidden_layers must be", edit(TEXT_ENCODER, num_hidden_layers=1)),
    "a million layers": ("num_hidden_layers must be", edit(TEXT_ENCODER, num_hidden_layers=10**6)),
    "heads that do not divide": ("must be a multiple of num_key_value", edit(TEXT_ENCODER, num_key_value_heads=3)),
    "a vocabulary below the tokenizer's": ("the tokenizer has ids up to", edit(TEXT_ENCODER, vocab_size=100)),
    "latents of another width": ("in_channels must be the vae's", edit(VAE, latent_channels=4)),
    "blocks of the folder": ("down_block_types must be", edit(VAE, down_block_types=["evil.Block"] * 4)),
    "three levels": ("block_out_channels must be", edit(VAE, block_out_channels=[16, 16, 32])),
    "groups that do not divide": ("multiples of norm_num_groups", edit(VAE, norm_num_groups=7)),
    "scaling zero": ("scaling_factor must be", edit(VAE, scaling_factor=0)),
    "activation of the folder": ("act_fn must be 'silu'", edit(VAE, act_fn="evil.activation")),
    "latent means": ("latents_mean must be null", edit(VAE, latents_mean=[0.0] * 16)),
    "unknown vae key": ("'time_compression'", edit(VAE, time_compression=4)),
    # weights
    "weights empty": (WEIGHTS, put(WEIGHTS, b"")),
    "weights garbage": (WEIGHTS, put(WEIGHTS, b"\x93garbage" * 500)),
    "weights seven bytes": (WEIGHTS, put(WEIGHTS, b"\x02\0\0\0\0\0\0")),
    "weights only a header": ("missing: 'x_pad_token'", headed(b"{}")),
    "weights cut by a byte": (WEIGHTS, resized(WEIGHTS, -1)),
    "weights cut in the header": (WEIGHTS, put(WEIGHTS, struct.pack("<Q", 9000) + b"{" * 99)),
    "weights with a byte more": (WEIGHTS, resized(WEIGHTS, 1)),
    "header of 2**63 bytes": (WEIGHTS, headed(b"{}", 2**63)),
    "header of 50 megabytes": (
        "at most 16777216 are read",
        in_turn(headed(b"{}", 50 << 20), resized(WEIGHTS, 60 << 20)),
    ),
    "header not json": (WEIGHTS, headed(b"nope")),
    "header a list": (WEIGHTS, headed(b"[]")),
    "header with doubled names": ("'a' occurs twice", headed(b'{"a": 1, "a": 2}')),
    "header nested deeply": (WEIGHTS, headed(b"[" * 100_000)),
    "header with bare tensors": (WEIGHTS, headed(b'{"x_pad_token": 1}')),
    "metadata of numbers": (WEIGHTS, headed(b'{"__metadata__": {"format": 1}}')),
    "tensor of unknown type": ("'EVIL'", header("x_pad_token", dtype="EVIL")),
    "tensor of negative size": ("'x_pad_token'", header("x_pad_token", shape=[-1, 64])),
    "tensor of half a size": ("'x_pad_token'", header("x_pad_token", shape=[0.5, 128])),
    "tensor of endless size": ("'x_pad_token'", header("x_pad_token", shape=[2**62, 2**62])),
    "tensor beyond the file": ("'x_pad_token'", header("x_pad_token", data_offsets=[2**40, 2**40 + 256])),
    "tensor backwards": ("'x_pad_token'", header("x_pad_token", data_offsets=[256, 0])),
    "tensors on each other": ("overlaps", header("x_pad_token", data_offsets=[0, 256])),
    "a gap between tensors": (
        "does not follow",
        headed(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}'),
    ),
    "a pickle called safetensors": (WEIGHTS, copied("pickled.pkl", WEIGHTS)),
    "a zip of pickles": (WEIGHTS, lambda folder: torch.save({"a": torch.ones(3)}, folder / WEIGHTS)),
    "pickles only": ("pickles are never read", remove(WEIGHTS)),
    "another precision's file only": (
        "model.fp16.safetensors",
        in_turn(copied(QWEN, "text_encoder/model.fp16.safetensors"), remove(QWEN, "text_encoder/pytorch_model.bin")),
    ),
    "no weights": ("vae should have", remove("vae/diffusion_pytorch_model.safetensors", "vae/training_args.bin")),
    "no component": ("vae is missing", remove("vae")),
    "a file for a component": (VAE, in_turn(remove("vae"), put("vae", "x"))),
    "a pipe for weights": (WEIGHTS, instead(WEIGHTS, os.mkfifo)),
    "a folder for weights": (WEIGHTS, instead(WEIGHTS, Path.mkdir)),
    "a device for weights": (WEIGHTS, instead(WEIGHTS, lambda path: path.symlink_to("/dev/zero"))),
    "a link to nothing": (WEIGHTS, instead(WEIGHTS, lambda path: path.symlink_to("../../blobs/gone"))),
    "a tensor missing": ("1 missing: 'x_pad_token' [1, 64]", tensor("x_pad_token", None)),
    "a tensor too many": ("1 unexpected: 'evil' [3]", tensor("evil", torch.ones(3))),
    "a tensor misshapen": ("'cap_pad_token' [64, 1] for [1, 64]", tensor("cap_pad_token", torch.ones(64, 1))),
    "whole numbers": ("'cap_pad_token' I64", tensor("cap_pad_token", torch.ones(1, 64).to(torch.int64))),
    "bytes": ("'cap_pad_token' U8", tensor("cap_pad_token", torch.ones(1, 64).to(torch.uint8))),
    "other eight-bit floats": (
        "'cap_pad_token' F8_E4M3FNUZ",
        tensor("cap_pad_token", torch.ones(1, 64).to(torch.float8_e4m3fnuz)),
    ),
    "truth values": ("'cap_pad_token' BOOL", tensor("cap_pad_token", torch.ones(1, 64).to(torch.bool))),
    "complex numbers": ("'cap_pad_token' C64", tensor("cap_pad_token", torch.ones(1, 64).to(torch.complex64))),
    "a value that is not a number": (f"{MATRIX!r}", last_value(torch.nan)),
    "an infinite value": (f"{MATRIX!r}", last_value(-torch.inf)),
    "a value beyond float16": ("beyond the range of float16", last_value(7e4)),
    "an endless name": ("1 unexpected: 'aaa", tensor("a" * 10**6, torch.ones(1))),
    "a name of control characters": ("'\\nTraceback\\x1b[31m'", tensor("\nTraceback\x1b[31m", torch.ones(1))),
    "another model's weights": (WEIGHTS.split("/")[1], copied("vae/diffusion_pytorch_model.safetensors", WEIGHTS)),
    "qwen of mixed prefixes": ("model.safetensors", tensor("norm.weight", torch.ones(64), QWEN)),
    "a layer beyond the last": (
        "unexpected: 'model.layers.3.",
        tensor("model.layers.3.mlp.up_proj.weight", torch.ones(1), QWEN),
    ),
    "a last layer of other shape": (
        "'model.layers.2.input_layernorm.weight' [3]",
        tensor("model.layers.2.input_layernorm.weight", torch.ones(3), QWEN),
    ),
    # the index of shards
    "index of shards and a whole file": ("has both", copied(INDEX, SHARDS)),
    "shard outside": ("'../../evil.safetensors'", sharded(x_pad_token="../../evil.safetensors")),
    "shard in the parent": ("'..safetensors/../a.safe", sharded(x_pad_token="..safetensors/../a.safetensors")),
    "shard absolute": ("'/tmp/evil.safetensors'", sharded(x_pad_token="/tmp/evil.safetensors")),
    "shard by backslashes": ("'..\\\\evil.safetensors'", sharded(x_pad_token="..\\evil.safetensors")),
    "shard in a folder": ("'sub/a.safetensors'", sharded(x_pad_token="sub/a.safetensors")),
    "shard a pickle": ("'weights.bin'", sharded(x_pad_token="weights.bin")),
    "shard hidden": ("'.safetensors'", sharded(x_pad_token=".safetensors")),
    "shard with a null byte": ("'a\\x00.safetensors'", sharded(x_pad_token="a\0.safetensors")),
    "shard with a new line": ("'a.safetensors\\n'", sharded(x_pad_token="a.safetensors\n")),
    "shard a number": ("'x_pad_token' should be in", sharded(x_pad_token=7)),
    "shard a list": ("'x_pad_token' should be in", sharded(x_pad_token=["a.safetensors"])),
    "shard with an endless name": ("'x_pad_token' should be in", sharded(x_pad_token="a" * 10**6 + ".safetensors")),
    "shard missing": ("names: b.safetensors", sharded(remove("transformer/b.safetensors"))),
    "shard renamed": ("names: c.safetensors", sharded(x_pad_token="c.safetensors")),
    "shard cut": ("transformer/b.safetensors", sharded(resized("transformer/b.safetensors", -4))),
    "shard a pipe": ("transformer/b.safetensors", sharded(instead("transformer/b.safetensors", os.mkfifo))),
    "no weight map": ("weight_map must say", sharded(put(SHARDS, "{}"))),
    "empty weight map": ("weight_map must say", sharded(put(SHARDS, '{"weight_map": {}}'))),
    "weight map a list": ("weight_map must say", sharded(put(SHARDS, '{"weight_map": ["a.safetensors"]}'))),
    "tensor in the other shard": ("'x_pad_token' (not in a.safetensors)", sharded(x_pad_token="a.safetensors")),
    "tensor not in the index": ("not in the index: 'x_pad_token'", sharded(x_pad_token=...)),
    "tensor in no shard": ("'evil' (not in a.safetensors)", sharded(evil="a.safetensors")),
    "tensor in both shards": (
        "in more than one file: 'x_pad_token'",
        sharded(tensor("x_pad_token", torch.ones(1, 64), "transformer/a.safetensors")),
    ),
    "index of shards not json": (SHARDS, sharded(put(SHARDS, "{"))),
    "index of shards too large": ("bytes, at most 16777216", sharded(resized(SHARDS, 17 << 20))),
    "index of shards a pipe": (SHARDS, sharded(instead(SHARDS, os.mkfifo))),
    "index of too many shards": (
        "names 1002 files",
        sharded(**{f"t{number}": f"s{number}.safetensors" for number in range(1000)}),
    ),
    # the tokenizer
    "no tokenizer": ("tokenizer should have", remove("tokenizer")),
    "no tokenizer config": (SETTINGS, remove(SETTINGS)),
    "no vocabulary": ("tokenizer should have", remove(TOKENIZER, "tokenizer/vocab.json")),
    "tokenizer not json": (TOKENIZER, put(TOKENIZER, "{")),
    "tokenizer empty object": ("the tokenizer cannot be built", put(TOKENIZER, "{}")),
    "tokenizer of another kind": ("tokenizer", edit(TOKENIZER, model={"type": "Unigram", "vocab": [["a", 0.0]]})),
    "tokenizer with a broken vocabulary": ("the tokenizer cannot be built", bpe(vocab=7)),
    "tokenizer with ids out of range": ("the tokenizer cannot be built", bpe(vocab={"a": 2**70})),
    "tokenizer with high ids": ("the tokenizer", bpe(vocab={"a": 10**6})),
    "tokenizer with strange merges": ("the tokenizer cannot be built", bpe(merges=[["x", "y"]])),
    "tokenizer a pipe": (TOKENIZER, instead(TOKENIZER, os.mkfifo)),
    "tokenizer a folder": (TOKENIZER, instead(TOKENIZER, Path.mkdir)),
    "vocabulary not an object": ("vocab.json", in_turn(remove(TOKENIZER), put("tokenizer/vocab.json", "[1]"))),
    "merges of bytes": ("merges.txt", in_turn(remove(TOKENIZER), put("tokenizer/merges.txt", b"\xff\xfe\x00"))),
    "merges of nothing": ("the tokenizer", in_turn(remove(TOKENIZER), put("tokenizer/merges.txt", "x y\n" * 9))),
    "tokenizer with auto_map": ("auto_map", edit(SETTINGS, auto_map={"AutoTokenizer": ["tokenization_evil.T", None]})),
    "tokenizer class of the folder": ("tokenizer_class must be", edit(SETTINGS, tokenizer_class="EvilTokenizer")),
    "tokens before every prompt": ("add_bos_token must be", edit(SETTINGS, add_bos_token=True)),
    "spaces before every prompt": ("add_prefix_space must be", edit(SETTINGS, add_prefix_space=True)),
    "split marks": ("split_special_tokens must be", edit(SETTINGS, split_special_tokens=True)),
    "a length of no size": ("model_max_length must be", edit(SETTINGS, model_max_length="long")),
    "marks missing": ("the tokenizer has no token <|im_end|>", marks(2)),
    "marks that eat spaces": ("does not give back", marks(5, rstrip=True)),
    "added tokens a list": ("added_tokens_decoder must be", edit(SETTINGS, added_tokens_decoder=[1])),
    "added tokens with strange keys": (
        "added_tokens_decoder must",
        edit(SETTINGS, added_tokens_decoder={"1": {"evil": 1}}),
    ),
    "a post-processor that adds tokens": ("does not give back", edit(TOKENIZER, post_processor=ADDS_TOKENS)),
    "added tokens with strange ids": (
        "added_tokens_decoder must",
        edit(SETTINGS, added_tokens_decoder={"-1": {"content": "a"}}),
    ),
    "a token that is a program": ("eos_token must be", edit(SETTINGS, eos_token={"content": "a", "__type": "Evil"})),
    "special tokens by name": ("extra_special_tokens must be", edit(SETTINGS, extra_special_tokens={"__class__": "a"})),
    "special tokens of numbers": ("additional_special_tokens must", edit(SETTINGS, additional_special_tokens=[1])),
    "older special tokens of numbers": ("special_tokens_map.json", older("special_tokens_map.json", {"eos_token": 7})),
    "older added tokens of text": ("added_tokens.json", older("added_tokens.json", {"<|im_end|>": "x"})),
    "template of private attributes": ("private attribute", template("{{ ''.__class__.__mro__ }}")),
    "template of private items": ("private item", template("{{ messages['__class__'] }}")),
    "template of private names": ("'__builtins__'", template("{{ __builtins__ }}")),
    "template with the filter attr": ("filter attr", template("{{ messages | attr('x') }}")),
    "template with mapped attributes": ("'__class__'", template("{{ messages | map(attribute='__class__') | list }}")),
    "template with an import": ("statement import", template("{% import 'evil' as evil %}")),
    "template with an include": ("statement include", template("{% include '/etc/passwd' %}")),
    "template with a parent": ("statement extends", template("{% extends 'evil' %}")),
    "template that does not parse": ("cannot be parsed", template("{% for %}")),
    "template nested deeply": ("cannot be parsed", template("{{ " + "(" * 20_000 + ")" * 20_000 + " }}")),
    "template of a megabyte": ("the chat template has", template("x" * 300_000)),
    "template without marks": ("has no <|im_start|>", edit(SETTINGS, chat_template="{{ messages }}")),
    "template a number": ("chat_template must be text", edit(SETTINGS, chat_template=7)),
    "templates by name": (
        "'__class__'",
        edit(SETTINGS, chat_template=[{"name": "tool", "template": TEMPLATE + "{{ x.__class__ }}"}]),
    ),
    "templates of numbers": ("chat_template must be text", edit(SETTINGS, chat_template=[7])),
    "template file of private attributes": (
        "chat_template.jinja",
        put("tokenizer/chat_template.jinja", TEMPLATE + "{{ x.__class__ }}"),
    ),
    "template file a pipe": ("chat_template.jinja", instead("tokenizer/chat_template.jinja", os.mkfifo)),
    "template file too large": ("chat_template.jinja", put("tokenizer/chat_template.jinja", TEMPLATE * 20_000)),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_by_name_and_nothing_of_it_runs(
    case: str, copy: Path, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, mutate = CASES[case]
    trace = tmp_path / "trace"
    plant(copy, trace)
    mutate(copy)
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(tmp_path)
    watch.seen.clear()
    watch.folder = str(copy)
    try:
        with pytest.raises(CheckpointError) as caught:
            load_components(copy, dtype=torch.float16, device=torch.device("cpu"))
    finally:
        watch.folder = None
    message = str(caught.value)
    assert said in message
    assert message.isprintable()
    assert "Traceback" not in message.replace("\\nTraceback", "")
    assert len(message) < 2500
    assert not watch.seen
    assert not trace.exists()


@pytest.mark.parametrize("case", [case for case in CASES if "value" not in case][::20])
def test_an_inspection_tells_it_too(case: str, copy: Path) -> None:
    said, mutate = CASES[case]
    plant(copy, copy / "trace")
    mutate(copy)
    assert any(said in problem for problem in inspect_checkpoint(copy).problems)
    assert not (copy / "trace").exists()


def test_the_watch_sees_what_it_should(copy: Path, watch: Watch, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    plant(copy, trace)
    watch.seen.clear()
    watch.folder = str(copy)
    try:
        with open(copy / "pickled.pkl", "rb") as file:
            pickle.load(file)
        assert trace.exists()
        exec(compile("pass", str(copy / "evil.py"), "exec"))
        with socket.socket():
            pass
    finally:
        watch.folder = None
    seen = {entry.split()[0] for entry in watch.seen}
    assert seen == {"open", "pickle.find_class", "exec", "compile", "socket.__new__"}


def test_settings_that_transformers_would_follow_are_left_out(copy: Path, watch: Watch, tmp_path: Path) -> None:
    """Harmless, since none of them reaches a library: other files, a gguf, positional arguments, more templates."""
    plant(copy, tmp_path / "trace")
    edit(
        SETTINGS,
        gguf_file="../../evil.gguf",
        init_inputs=[{"a": 0}, []],
        fast_tokenizer_files=["tokenizer.9.0.0.json", "../evil.json"],
        vocab_file="/etc/passwd",
        tokenizer_file="/etc/passwd",
        tokenizer_object=1,
        fix_mistral_regex=True,
        evil_token="<|im_start|>",
    )(copy)
    (copy / "tokenizer" / "additional_chat_templates").mkdir()
    put("tokenizer/additional_chat_templates/evil.jinja", "{{ ''.__class__ }}")(copy)
    put("tokenizer/config.json", '{"model_type": "mistral", "transformers_version": "4.0.0"}')(copy)
    put("tokenizer/tokenizer.model", b"evil")(copy)
    watch.seen.clear()
    watch.folder = str(copy)
    try:
        tokenizer = load_components(copy, dtype=torch.float32).tokenizer
    finally:
        watch.folder = None
    assert not watch.seen
    assert tokenizer.decode(tokenizer("<|im_start|>a fox")["input_ids"]) == "<|im_start|>a fox"
    assert isinstance(tokenizer.chat_template, str)
    assert not hasattr(tokenizer, "fix_mistral_regex")


def test_a_file_that_shrinks_while_it_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def surveyed(folder: Path, transformer: Path | None) -> Survey:
        found = survey(folder, transformer)
        resized(WEIGHTS, -1000)(copy)
        return found

    monkeypatch.setattr("zimage.checkpoint.load.survey", surveyed)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} became shorter while it was read"):
        load_components(copy, dtype=torch.float32)


def test_the_cause_is_kept(copy: Path) -> None:
    put(INDEX, "{")(copy)
    with pytest.raises(CheckpointError) as caught:
        load_components(copy, dtype=torch.float32)
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)


@pytest.mark.parametrize("folder", ["gone", "file", "loop"])
def test_what_is_no_folder(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=f"{folder} is (no folder|missing)"):
        load_components(tmp_path / folder, dtype=torch.float32)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60
