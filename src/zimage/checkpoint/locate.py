"""From what a user calls a model to a folder on disk: an alias, a folder, or a hub id that is downloaded.

Downloads go through huggingface_hub, with its cache and its environment variables, file by file: the configs, which are checked
before anything large is fetched, and exactly the shards that the index names. Knows what a checkpoint needs, not what its weights
are; loads no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import CheckpointError
from ..variants import VARIANTS
from .configs import MODEL_INDEX, PARTS, SCHEDULER, Problems, read_configs, read_model_index
from .reading import reason, shown
from .shards import index_name, read_index, single_name

_SINGLE_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja"),
)

Fetch = Callable[[str], Path | None]
"""Brings one file by its name in the repository; None where the repository has no such file."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a checkpoint lies: its `folder`, and for one from the hub its id and the commit where known."""

    folder: Path
    hub_id: str | None = None
    revision: str | None = None


def locate(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Location:
    """Find the checkpoint that `source` means, downloading what is not in the cache yet.

    `source` is an alias ("base", "turbo"), a folder, or a hub id like "Tongyi-MAI/Z-Image"; a path object is always a
    folder. `revision` (a branch, tag or commit), `cache_dir`, `token` and `local_files_only` are as in
    `huggingface_hub.hf_hub_download`. Raises `CheckpointError` where there is no such checkpoint or it cannot be had.
    """
    if isinstance(source, str) and source in VARIANTS:
        source = VARIANTS[source].hub_id
    elif not isinstance(source, str) or _is_path(source) or Path(source).exists():
        return _local(source, revision)
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"cannot find the model {shown(source)}: it is no folder here; "
            f"give {', '.join(map(repr, VARIANTS))}, a folder, or a hub id like {VARIANTS['turbo'].hub_id!r}"
        )
    return _download(
        source, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )


def _is_path(source: str) -> bool:
    looks = source.startswith((".", "/", "~", "\\")) or source.lower().endswith(_SINGLE_FILES)
    return looks or Path(source).is_absolute() or source.count("/") > 1 or "\\" in source


def _local(source: str | os.PathLike[str], revision: str | None) -> Location:
    try:
        folder = Path(source).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{shown(source)} is no path that can be read: {reason(error)}") from error
    if not is_folder:
        if is_there or folder.suffix.lower() in _SINGLE_FILES:
            raise CheckpointError(
                f"a checkpoint is a folder in the hub's layout, got the file {folder}; single files are not supported "
                f"yet: give the folder with model_index.json, or a hub id like {VARIANTS['turbo'].hub_id!r}"
            )
        raise CheckpointError(
            f"there is no folder {folder}; give one with model_index.json in it, {', '.join(map(repr, VARIANTS))}, or a hub id"
        )
    if revision is not None:
        raise CheckpointError(f"revision={revision!r} has no meaning for the folder {folder}; leave it out")
    return Location(folder=folder)


def _download(
    hub_id: str,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Location:
    common = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    first = _require(partial(_fetch, hub_id, revision=revision, **common), hub_id, MODEL_INDEX.as_posix())
    folder = first.parent
    read_model_index(folder)  # a foreign repository is known by now, and nothing else of it is fetched
    # The cache keeps each commit in a folder of its name: what follows comes from the same commit as the first file.
    fetch: Fetch = partial(_fetch, hub_id, revision=folder.name, **common)
    _require(fetch, hub_id, SCHEDULER.as_posix())
    for component in PARTS:
        _require(fetch, hub_id, f"{component}/config.json")
    for name in _TOKENIZER_FILES:
        fetch(f"tokenizer/{name}")
    problems = Problems()
    read_configs(folder, problems)
    if problems.errors:
        raise problems.errors[0]
    for component in PARTS:
        index = fetch(f"{component}/{index_name(component)}")
        shards = sorted(set(read_index(index).values())) if index else [single_name(component)]
        for shard in shards:
            _require(fetch, hub_id, f"{component}/{shard}")
    return Location(folder=folder, hub_id=hub_id, revision=folder.name)


def _require(fetch: Fetch, hub_id: str, name: str) -> Path:
    path = fetch(name)
    if path is None:
        raise CheckpointError(f"{hub_id} has no {name}, so it is no Z-Image checkpoint in diffusers' layout; check the id")
    return path


def _fetch(hub_id: str, name: str, *, revision: str | None, local_files_only: bool, **common: object) -> Path | None:
    ...
