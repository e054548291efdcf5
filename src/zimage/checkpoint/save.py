"""Writes components as a checkpoint folder in the hub's layout, for zimage and for diffusers; whole or not at all.

Transformer and VAE are written from memory. Text encoder and tokenizer are copied from the folder that they came
from, since zimage does not hold the text encoder's last layer. Knows nothing of adapters: they are detached before.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, RequestError
from .configs import CLASSES, LEGACY_TOKENIZER_FILES, MODEL_INDEX, SCHEDULER, TEMPLATE_FILE, TOKENIZER_FILES
from .folders import check_free, copy_file, sync, target_path, whole_or_nothing, write_json
from .load import Components
from .modules import build
from .outgoing import for_hub
from .reading import exists
from .shards import index_name, single_name
from .single import read_component
from .survey import survey
from .writing import write_shards

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_components(
    components: Components, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> Path:
    """Write `components` to `folder`, which must not exist or be empty, and return it.

    Weights keep the type that they have in memory, but for the text encoder, whose files are copied as they are from
    `components.folder`, or its tensors from its own file. Without such a folder the layers that are held are written;
    zimage loads that, and diffusers does with a warning about the last layer, which it never uses. `max_shard_size` is
    in bytes or like "5GB".
    Raises `RequestError` for a folder that is in use and `CheckpointError` for components that are no plain model.
    """
    target = target_path(folder)
    shard_bytes = shard_size(max_shard_size)
    check_free(target)
    with whole_or_nothing(target) as partial:
        _write_configs(components, partial)
        for name, module in (("transformer", components.transformer), ("vae", components.vae)):
            config = {key: value for key, value in module.config.items() if not key.startswith("_")}
            _write_part(partial, name, module, config, shard_bytes)
        if components.folder is None:
            _write_text_encoder(components, partial, shard_bytes)
        else:
            _copy_text_encoder(components, partial, shard_bytes)
        survey(partial).require()
    return target


def _write_configs(components: Components, folder: Path) -> None:
    known = {name: [library, classes[0]] for name, (library, classes) in CLASSES.items()}
    write_json(folder / MODEL_INDEX, {"_class_name": "ZImagePipeline", **_made_by(), **known})
    scheduler: dict[str, Any] = {"num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift": components.shift}
    described = {"_class_name": CLASSES["scheduler"][1][0], **_made_by(), **scheduler}
    write_json(folder / SCHEDULER, described | components.own.to_config())


def _write_part(folder: Path, component: str, module: nn.Module, config: dict[str, Any], shard_bytes: int) -> None:
    plain = {name: list(shape) if isinstance(shape, tuple) else shape for name, shape in config.items()}
    write_json(folder / component / "config.json", {"_class_name": CLASSES[component][1][0], **_made_by(), **plain})
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
    write_json(folder / "text_encoder" / "config.json", described)
    state = components.text_encoder.state_dict()
    _write_weights(folder / "text_encoder", "text_encoder", state, shard_bytes)
    try:
        components.tokenizer.save_pretrained(folder / "tokenizer")
    except Exception as error:  # what its library raises for a full disk is of no other class
        if "(os error " not in str(error):
            raise
        raise _of_the_disk(error) from error


def _copy_text_encoder(components: Components, folder: Path, shard_bytes: int) -> None:
    """Copy the files that are known and no others, so that nothing planted beside them travels along; of a text encoder
    in a file of its own, its tensors."""
    source = components.folder
    assert source is not None
    found, is_apart = read_component(source, "text_encoder", components.files), "text_encoder" in components.files
    weights = [] if is_apart else [index_name("text_encoder"), *(header.path.name for header in found.headers)]
    wanted = {
        "text_encoder": ("config.json", "generation_config.json", *weights),
        "tokenizer": (*TOKENIZER_FILES, *LEGACY_TOKENIZER_FILES, TEMPLATE_FILE),
    }
    for part, names in wanted.items():
        (folder / part).mkdir()
        for name in names:
            if exists(source / part / name):
                copy_file(source / part / name, folder / part / name)
    if is_apart:
        write_shards(folder / "text_encoder", "text_encoder", for_hub("text_encoder", found, None), shard_bytes)


def _write_weights(place: Path, component: str, state: dict[str, Tensor], shard_bytes: int) -> None:
    place.mkdir(exist_ok=True)
    pattern = single_name(component).replace(".safetensors", "{suffix}.safetensors")
    plan = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=shard_bytes)
    for name, tensors in plan.filename_to_tensors.items():
        shard = {tensor: state[tensor].detach().to("cpu").contiguous() for tensor in tensors}
        try:
            save_file(shard, place / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise _of_the_disk(error) from error
        with open(place / name, "r+b") as written:
            sync(written)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(place / index_name(component), index)


def _of_the_disk(error: Exception) -> OSError:
    """What the disk said, which safetensors wraps: "...I/O error: No space left on device (os error 28) at path...",
    and tokenizers does not."""
    said = re.search(r"(?:.*I/O error: |^)(.+) \(os error (\d+)\)", str(error))
    return OSError(int(said[2]), said[1]) if said else OSError(str(error))


def shard_size(size: object) -> int:
    """Bytes of "5GB" or of a number; raises `RequestError` for anything else."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?) ?([KMGT]?)B", size) if isinstance(size, str) else None
    amount = int(float(found[1]) * _UNITS[found[2]]) if found else size
    if type(amount) is not int or amount < 1:
        raise RequestError(f"max_shard_size must be bytes or like '5GB', got {size!r}")
    return amount


def _made_by() -> dict[str, str]:
    return {"_diffusers_version": version("diffusers")}
