"""From what a user calls a ControlNet to the headers of its files and its config, read from config.json or from those.

Published files come alone and have no config: how many layers there are, how wide, and which kind, is told by the names
and shapes of their tensors. Every failure is an `AdapterError`. Reads no values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.fields import Field, exactly, flag, integer, integers, number, read_config, read_fields
from ..checkpoint.headers import Entry, read_header
from ..checkpoint.hub import Repository, named_on_hub, or_here
from ..checkpoint.reading import exists, reason, shown
from ..checkpoint.shards import Weights, index_name, read_index, read_place, single_name
from ..errors import AdapterError
from .origin import architecture_of_keys
from .source import HUB_FILE

CLASS = "ZImageControlNetModel"
CONFIG = "config.json"
REFINED, TWICE = "control_noise_refiner", "control_layers"
"""What refines the control image: blocks of its own with hints (2.1), or the control layers, run twice (2.0). In 1.0 it
is plain blocks, and `add_control_noise_refiner` is None."""

_SHARED = re.compile(r"(?:t_embedder|all_x_embedder|cap_embedder|noise_refiner|context_refiner)\.|(?:x|cap)_pad_token$")
"""Tensors of the transformer, which diffusers saves along with a ControlNet that was used."""
_FOREIGN = (
    ("Flux", re.compile(r"controlnet_x_embedder|controlnet_blocks|double_blocks")),
    (
        "Stable Diffusion",
        re.compile(r"control_model\.|input_hint_block|controlnet_cond_embedding|controlnet_down_blocks"),
    ),
)
_BLOCK = re.compile(r"(control_layers|control_noise_refiner)\.(\d{1,3})\.")


@dataclass(frozen=True, kw_only=True)
class ControlPlace:
    """A ControlNet's files: its name, its place, the headers of its weights, and its config if it has one."""

    name: str
    path: Path
    weights: Weights
    config: Path | None = None
    hub: bool = False


def locate_controlnet(
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> ControlPlace:
    """Find the ControlNet that `source` means: a folder in diffusers' layout, a safetensors file, a hub id with either,
    or "owner/name/file.safetensors" on the hub; `weight_name` names the file in a folder or repository.

    Raises `AdapterError`, and `CheckpointError` for files that are not whole.
    """
    try:
        path = Path(source).expanduser()
        is_there, is_folder = path.exists(), path.is_dir()
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise AdapterError(
            f"a ControlNet is a file, a folder, a hub id or diffusers' {CLASS}, got {shown(source)}: {reason(error)}"
        ) from error
    if is_there and not is_folder:
        if weight_name is not None:
            raise AdapterError(f"{path} is a file, so weight_name={weight_name!r} says nothing; leave it out")
        return _single(path, str(path))
    if is_there:
        return _in_folder(path, weight_name)
    found = named_on_hub(source, HUB_FILE)
    if found is None or (found[2] and weight_name):
        raise AdapterError(
            f"cannot find the ControlNet {shown(str(source))}: it is no file or folder that is here, and no hub id"
        )
    repository = Repository(
        found[1], revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )
    name = found[2] or weight_name
    with or_here(str(source)):
        return replace(_on_hub(repository, name), name="/".join(filter(None, (found[1], name))), hub=True)


def read_description(place: ControlPlace, transformer: Mapping[str, Any]) -> tuple[dict[str, Any], Weights]:
    """The arguments of diffusers' class for the ControlNet at `place`, and the headers of its own tensors.

    `transformer` is the config of the one that it shall steer. Raises `AdapterError` for other architectures.
    """
    if place.config is not None:
        named = read_config(place.config).get("_class_name")
        if named != CLASS:
            raise AdapterError(f"{place.config} is of a {shown(named)}; a ControlNet for Z-Image is a {CLASS}")
    headers = tuple(
        replace(header, entries={name: entry for name, entry in header.entries.items() if not _SHARED.match(name)})
        for header in place.weights.headers
    )
    weights = Weights(headers)
    entries = weights.entries
    if not any(_BLOCK.match(name) for name in entries):
        known = next((called for called, keys in _FOREIGN if keys.search("\n".join(entries))), None)
        known = known or architecture_of_keys(entries)
        was = f"it was made for {known}" if known else "it is no ControlNet for Z-Image"
        raise AdapterError(f"{place.name} has no control_layers: {was}; take a {CLASS} or a file that has its tensors")
    if place.config is None:
        config = _described(entries, transformer, place.name)
    else:
        config = read_fields(place.config, _FIELDS, others="refuse")
        config["control_refiner_layers_places"] = config["control_refiner_layers_places"] or []
    if config["add_control_noise_refiner"] == TWICE:
        weights = Weights(tuple(
            replace(header, entries={n: e for n, e in header.entries.items() if not n.startswith(f"{REFINED}.")})
            for header in headers
        ))  # fmt: skip
    return config, weights


def _single(path: Path, name: str) -> ControlPlace:
    if path.suffix.lower() != ".safetensors":
        raise AdapterError(
            f"a ControlNet is read from .safetensors files, got {shown(path.name)}; pickles (.pt, .bin, .ckpt) can run "
            "code and are never read: convert it where you trust it"
        )
    beside = path.with_name(CONFIG)
    config = beside if path.name == single_name("controlnet") and exists(beside) else None
    return ControlPlace(name=name, path=path, weights=Weights((read_header(path),)), config=config)


def _in_folder(folder: Path, weight_name: str | None) -> ControlPlace:
    if weight_name is not None:
        if not exists(folder / weight_name):
            raise AdapterError(f"{folder} has no {weight_name}; give a weight_name that it has")
        return _single(folder / weight_name, str(folder / weight_name))
    if exists(folder / CONFIG):
        weights = read_place(folder, "controlnet")
        return ControlPlace(name=str(folder), path=folder, weights=weights, config=folder / CONFIG)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        came = ", ".join(path.name for path in found[:5]) or "neither that nor a .safetensors file"
        raise AdapterError(
            f"{folder} should hold a ControlNet with its {CONFIG}, or one file, and has {came}; name the file with "
            "weight_name"
        )
    return _single(found[0], str(found[0]))


def _on_hub(repository: Repository, name: str | None) -> ControlPlace:
    if name is not None:
        return _single(repository.require(name, "see which files it has on its page"), name)
    config = repository.require(CONFIG, "so name the file that it has with weight_name, or 'owner/name/file'")
    repository.revision = config.parent.name
    index = repository.fetch(index_name("controlnet"))
    for file in [single_name("controlnet")] if index is None else sorted(set(read_index(index).values())):
        repository.require(file, f"which belongs to its {CONFIG}")
    return _in_folder(config.parent, None)


def _described(entries: Mapping[str, Entry], transformer: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config of a published file, as its tensors tell it.

    Hints are spread over the layers: in VideoX-Fun's configs the 6 of 1.0 are 5 layers apart, the 15 of 2.0 and 2.1 are
    2 apart, and the 3 of "lite" 10.
    """
    counts = dict.fromkeys((TWICE, REFINED), 0)
    for block in filter(None, map(_BLOCK.match, entries)):
        counts[block[1]] = max(counts[block[1]], int(block[2]) + 1)
    embedder, norm = (
        entries.get("control_all_x_embedder.2-1.weight"),
        entries.get("control_layers.0.attention.norm_q.weight"),
    )
    if embedder is None or len(embedder.shape) != 2 or embedder.shape[1] % 4 or not counts[TWICE]:
        raise AdapterError(f"{name} lacks control_all_x_embedder.2-1.weight or control_layers.0; the file is not whole")
    dim, channels = embedder.shape[0], embedder.shape[1] // 4
    heads = dim // norm.shape[0] if norm is not None and norm.shape and norm.shape[0] else transformer["n_heads"]
    layers, count = transformer["n_layers"], counts[TWICE]
    places = list(range(0, layers, max(1, round(layers / count))))[:count]
    if len(places) != count:
        raise AdapterError(
            f"{name} has {count} control layers and the transformer {layers}; it was made for another model"
        )
    kind: str | None = REFINED if f"{REFINED}.0.before_proj.weight" in entries else TWICE
    if kind == TWICE and channels == transformer["in_channels"] and counts[REFINED]:
        kind = None
    return {
        "control_layers_places": places,
        "control_refiner_layers_places": [] if kind is None else list(range(transformer["n_refiner_layers"])),
        "control_in_dim": channels,
        "add_control_noise_refiner": kind,
        "dim": dim,
        "n_refiner_layers": counts[REFINED],
        "n_heads": heads,
        "n_kv_heads": heads,
        "norm_eps": transformer["norm_eps"],
        "qk_norm": norm is not None,
    }


def _places(least: int, **default: Any) -> Field:
    """A list of layers that hints come after."""

    def accepts(value: Any) -> bool:
        if value is None and not least:
            return True
        plain = isinstance(value, list) and all(type(one) is int and 0 <= one < 1000 for one in value)
        return plain and least <= len(value) and value == sorted(set(value)) and value[:least] == [0] * least

    return Field(accepts, f"a list of ascending layer numbers{', the first of them 0' * least}", **default)


_FIELDS: dict[str, Field] = {
    "control_layers_places": _places(1),
    "control_refiner_layers_places": _places(0, default=[]),
    "control_in_dim": integer(1, 1024),
    "add_control_noise_refiner": exactly(None, TWICE, REFINED, default=None),
    "all_patch_size": integers(1, 2, 2, [2]),
    "all_f_patch_size": integers(1, 1, 1, [1]),
    "dim": integer(1, 1 << 16, 3840),
    "n_refiner_layers": integer(0, 100, 2),
    "n_heads": integer(1, 1024, 30),
    "n_kv_heads": integer(1, 1024, 30),
    "norm_eps": number(0, 1, 1e-5),
    "qk_norm": flag(True),
}
"""What diffusers' class takes, with its defaults."""
