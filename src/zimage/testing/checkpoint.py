"""Writes a random-weight checkpoint to disk: folders, configs, tokenizer and safetensors shards as on the hub.

Holds one shard in memory at a time and shows the folder only when it is whole. What weights and configs contain is
decided in `weights`, `configs` and `tokenizer`.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file

from ..variants import get_variant
from . import configs
from .configs import DIFFUSERS_VERSION, SIZES, Config, DtypeName
from .tokenizer import write_tokenizer
from .weights import Values, tensor_shapes

SizeName = Literal["tiny", "small", "wide", "real"]
VariantName = Literal["base", "turbo"]
Activations = Literal["sane", "large"]
TextEncoderClass = Literal["Qwen3Model", "Qwen3ForCausalLM"]
TextEncoderPrefix = Literal["model.", ""]

_STEMS = {
    "text_encoder": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def build_checkpoint(
    folder: str | os.PathLike[str],
    *,
    size: SizeName = "tiny",
    variant: VariantName = "turbo",
    dtype: DtypeName | None = None,
    transformer_dtype: DtypeName | None = None,
    activations: Activations = "sane",
    seed: int = 0,
    max_shard_size: int | str | None = None,
    text_encoder_class: TextEncoderClass = "Qwen3Model",
    text_encoder_prefix: TextEncoderPrefix = "model.",
) -> Path:
    """Write a checkpoint with random weights in the layout of `Tongyi-MAI/Z-Image` and `-Turbo`; return its folder.

    Sizes: `tiny` (under 5 MB, for tests), `small` (0.13 billion parameters), `wide` (every real width, few layers,
    3.7 GB) and `real` (the real shape, 20 GB). The variants differ in the scheduler's shift alone. `dtype` is float32
    for tiny and small and bfloat16 for wide and real unless given; `transformer_dtype` overrules it for the transformer
    (the Turbo repository has float32 there). `activations="large"` drives the hidden activations of every feed-forward
    of the transformer past the end of float16. Weights follow from `size`, `seed` and `activations` alone: sharding
    does not change them, and dtype only rounds. No global random state is used.

    `max_shard_size`, in bytes or like `"5MB"`, bounds the shards of transformer and text encoder; without it `real` has
    three of each and the others have one file. As on the hub, the text encoder's tensors are named `model.…` whichever
    class `model_index.json` gives; `text_encoder_prefix=""` names them as `Qwen3Model.save_pretrained` does.

    Raises `ValueError` for an option that is none of the above, and for a folder that exists and is not empty.
    """
    _one_of("size", size, tuple(SIZES))
    _one_of("dtype", dtype, (None, *get_args(DtypeName)))
    _one_of("transformer_dtype", transformer_dtype, (None, *get_args(DtypeName)))
    _one_of("activations", activations, get_args(Activations))
    _one_of("text_encoder_class", text_encoder_class, get_args(TextEncoderClass))
    _one_of("text_encoder_prefix", text_encoder_prefix, get_args(TextEncoderPrefix))
    shift, version, widths = get_variant(variant).shift, DIFFUSERS_VERSION[variant], SIZES[size]
    shard_bytes = None if max_shard_size is None else _bytes(max_shard_size)
    dtype = dtype or widths.dtype

    def write(component: str, config: Config, dtype: DtypeName, prefix: str = "") -> None:
        values = Values(
            component=component, size=widths, seed=seed, dtype=getattr(torch, dtype), large=activations == "large"
        )
        per_shard = widths.shard_parameters.get(component)
        if shard_bytes is not None and component != "vae":
            per_shard = shard_bytes // values.dtype.itemsize
        _write_json(root / component / "config.json", config)
        _write_shards(root / component, _shards(tensor_shapes(component, config), per_shard), values, prefix)

    with _whole_or_nothing(Path(folder)) as root:
        _write_json(root / "model_index.json", configs.model_index(version, text_encoder_class))
        _write_json(root / "scheduler" / "scheduler_config.json", configs.scheduler_config(version, shift))
        ids = write_tokenizer(root / "tokenizer")
        write("text_encoder", configs.text_encoder_config(widths, dtype, **ids), dtype, text_encoder_prefix)
        write("transformer", configs.transformer_config(widths, version), transformer_dtype or dtype)
        write("vae", configs.vae_config(widths, version), dtype)
    return Path(folder)


def checkpoint_parameters(size: SizeName) -> dict[str, int]:
    """Number of parameters of each component (`text_encoder`, `transformer`, `vae`) of a size; builds no weights."""
    _one_of("size", size, tuple(SIZES))
    widths, version = SIZES[size], DIFFUSERS_VERSION["turbo"]
    described = {
        "text_encoder": configs.text_encoder_config(widths, widths.dtype, bos_token_id=0, eos_token_id=0),
        "transformer": configs.transformer_config(widths, version),
        "vae": configs.vae_config(widths, version),
    }
    return {
        component: sum(tensor.numel() for tensor in tensor_shapes(component, config).values())
        for component, config in described.items()
    }


def _one_of(option: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _bytes(size: int | str) -> int:
    """A size such as `5000000` or `"5MB"` in bytes; units are powers of ten, as in huggingface_hub."""
    text = str(size).strip().upper()
    unit = _UNITS.get(text[-2:], 1)
    number = text[:-2] if unit > 1 else text
    try:
        count = int(float(number) * unit)
    except ValueError:
        count = 0
    if count <= 0:
        raise ValueError(f"max_shard_size must be bytes or like '5MB' (KB, MB, GB), got {size!r}")
    return count


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder` that takes its place once the body is done, and is removed if that fails."""
    target = folder.absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another, or delete it first")
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_json(path: Path, content: Config) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shards(shapes: dict[str, torch.Size], per_shard: int | None) -> list[dict[str, torch.Size]]:
    """Fill shards in order, each with at most `per_shard` parameters, or with one tensor that has more."""
    shards: list[dict[str, torch.Size]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if per_shard is not None and shards[-1] and filled + shape.numel() > per_shard:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += shape.numel()
    return shards


def _write_shards(folder: Path, shards: list[dict[str, torch.Size]], values: Values, prefix: str) -> None:
    stem = _STEMS[values.component]
    weight_map: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
        file = f"{stem}{part}.safetensors"
        tensors = {prefix + name: values.tensor(name, shape) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / f"{stem}.safetensors.index.json", index)
