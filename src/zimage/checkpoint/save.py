"""Writes components as a checkpoint folder in the hub's layout, for zimage and for diffusers; whole or not at all.

Transformer and VAE are written from memory. Text encoder and tokenizer are copied from the folder that they came
from, since zimage does not hold the text encoder's last layer. Knows nothing of adapters: they are detached before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, RequestError
from .configs import CLASSES, LEGACY_TOKENIZER_FILES, MODEL_INDEX, SCHEDULER, TEMPLATE_FILE, TOKENIZER_FILES
from .load import Components
from .modules import build
from .reading import exists, open_regular, reason
from .shards import index_name, read_weights, single_name
from .survey import survey

_COPY = 16 << 20
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_components(
    components: Components, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> Path:
    """Write `components` to `folder`, which must not exist or be empty, and return it.

    Weights keep the type that they have in memory, but for the text encoder, whose files are copied as they are from
    `components.folder`. Without such a folder the layers that are held are written; zimage loads that, and diffusers
    does with a warning about the last layer, which it never uses. `max_shard_size` is in bytes or like "5GB".
    Raises `RequestError` for a folder that is in use and `CheckpointError` for components that are no plain model.
    """
    target = Path(folder).expanduser()
    shard_bytes = _bytes(max_shard_size)
    if exists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise RequestError(f"{target} exists and is not an empty folder; choose another, or delete it first")
    with _whole_or_nothing(target) as partial:
        _write_configs(components, partial)
        for name, module in (("transformer", components.transformer), ("vae", components.vae)):
            config = {key: value for key, value in module.config.items() if not key.startswith("_")}
            _write_part(partial, name, module, config, shard_bytes)
        if components.folder is None:
            _write_text_encoder(components, partial, shard_bytes)
        else:
            _copy_text_encoder(components.folder, partial)
        survey(partial).require()
    return target


def _write_configs(components: Components, folder: Path) -> None:
    known = {name: [library, classes[0]] for name, (library, classes) in CLASSES.items()}
    _write_json(folder / MODEL_INDEX, {"_class_name": "ZImagePipeline", **_made_by(), **known})
    scheduler = {"num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift": components.shift}
    _write_json(folder / SCHEDULER, {"_class_name": CLASSES["scheduler"][1][0], **_made_by(), **scheduler})


def _write_part(folder: Path, component: str, module: nn.Module, config: dict[str, Any], shard_bytes: int) -> None:
    plain = {name: list(shape) if isinstance(shape, tuple) else shape for name, shape in config.items()}
    _write_json(folder / component / "config.json", {"_class_name": CLASSES[component][1][0], **_made_by(), **plain})
    expected = build(component, plain, ()).needed
    state = module.state_dict()
    odd = sorted(set(state) ^ set(expected)) or [name for name in state if not _is_plain(state[name], expected[name])]
    if odd:
        raise CheckpointError(
            f"the {component} is no plain model: {len(odd)} of its tensors differ, such as {odd[0]!r}; "
            "detach adapters and load it without quantisation or offloading before saving"
        )
    _write_weights(folder / component, component, state, shard_bytes)


def _is_plain(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return tuple(tensor.shape) == shape and tensor.dtype in _DTYPES and not tensor.is_meta


def _write_text_encoder(components: Components, folder: Path, shard_bytes: int) -> None:
    config = components.text_encoder.config
    kept = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "tie_word_embeddings"),
    )
    described = {key: getattr(config, key) for key in kept} | {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        "num_hidden_layers": components.text_encoder_layers,
        "rope_theta": config.rope_parameters["rope_theta"],
        "use_sliding_window": False,
    }
    _write_json(folder / "text_encoder" / "config.json", described)
    state = components.text_encoder.state_dict()
    _write_weights(folder / "text_encoder", "text_encoder", state, shard_bytes)
    components.tokenizer.save_pretrained(folder / "tokenizer")


def _copy_text_encoder(source: Path, folder: Path) -> None:
    """Copy the files that are known and no others, so that nothing planted beside them travels along."""
    weights = [header.path.name for header in read_weights(source, "text_encoder").headers]
    wanted = {
        "text_encoder": ("config.json", "generation_config.json", index_name("text_encoder"), *weights),
        "tokenizer": (*TOKENIZER_FILES, *LEGACY_TOKENIZER_FILES, TEMPLATE_FILE),
    }
    for part, names in wanted.items():
        (folder / part).mkdir()
        for name in names:
            if exists(source / part / name):
                _copy(source / part / name, folder / part / name)


def _copy(source: Path, target: Path) -> None:
    try:
        with open_regular(source) as reading, open(target, "wb") as writing:
            shutil.copyfileobj(reading, writing, _COPY)
            _sync(writing)
    except OSError as error:
        raise CheckpointError(f"{source} cannot be copied to {target}: {reason(error)}") from error


def _write_weights(place: Path, component: str, state: dict[str, Tensor], shard_bytes: int) -> None:
    place.mkdir(exist_ok=True)
    pattern = single_name(component).replace(".safetensors", "{suffix}.safetensors")
    plan = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=shard_bytes)
    for name, tensors in plan.filename_to_tensors.items():
        shard = {tensor: state[tensor].detach().to("cpu").contiguous() for tensor in tensors}
        save_file(shard, place / name, metadata={"format": "pt"})
        with open(place / name, "r+b") as written:
            _sync(written)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(place / index_name(component), index)


def _write_json(path: Path, config: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2) + "\n")
        _sync(file)


def _bytes(size: object) -> int:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?) ?([KMGT]?)B", size) if isinstance(size, str) else None
    amount = int(float(found[1]) * _UNITS[found[2]]) if found else size
    if type(amount) is not int or amount < 1:
        raise RequestError(f"max_shard_size must be bytes or like '5GB', got {size!r}")
    return amount


def _made_by() -> dict[str, str]:
    return {"_diffusers_version": version("diffusers")}


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _whole_or_nothing(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target` that takes its place in the end, and is removed if anything fails."""
    partial = target.absolute().with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{target} cannot be written: {reason(error)}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
