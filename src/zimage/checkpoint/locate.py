"""From what a user calls a model to a folder on disk: an alias, a folder, or a hub id that is downloaded.

Downloads go through huggingface_hub, with its cache and its environment variables, file by file: the configs, which are
checked before anything large is fetched, and exactly the shards that the index names. Knows what files a checkpoint
has, not what its weights mean; loads no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..variants import DEMOS, VARIANTS, get_variant
from .configs import (
    LEGACY_TOKENIZER_FILES,
    MODEL_INDEX,
    PARTS,
    SCHEDULER,
    TEMPLATE_FILE,
    TOKENIZER_FILES,
    Problems,
    read_configs,
    read_model_index,
)
from .fields import read_config
from .hub import Repository, named_on_hub, or_here
from .reading import reason, shown
from .shards import index_name, read_index, single_name
from .single import SUFFIXES

_SINGLE_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96})/([\w./ -]{1,200}\.(?:gguf|safetensors))", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a checkpoint lies: its `folder`, for one from the hub its id and the commit, for a demo model its name."""

    folder: Path
    demo: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    """By component the file of its weights, where they are not the folder's."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What those are called on the hub that are from there."""


def locate(
    source: str | os.PathLike[str],
    *,
    transformer: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    parts: Sequence[str] = PARTS,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Location:
    """Find the checkpoint that `source` means, downloading what is not in the cache yet.

    `source` is an alias ("base", "turbo", "demo"), a folder, or a hub id like "Tongyi-MAI/Z-Image"; a path object is
    never an alias or an id. `revision` (a branch, tag or commit), `cache_dir`, `token` and `local_files_only`
    mean what they do in `huggingface_hub.hf_hub_download`. `transformer`, `text_encoder` and `vae` are files with the
    weights of those, here or on the hub ("owner/name/file.gguf"), instead of those of `source`, which are then not
    needed. `source` may be such a file of a transformer too: then all else is that of the released model of `variant`,
    which must be given. Of `parts` alone weights are needed. Raises `CheckpointError` where there is no such checkpoint
    or it cannot be had.
    """
    settings = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    given = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    if _is_single(source):
        given["transformer"], source = source, _model_around(source, given, variant)
    found = {part: _locate_file(part, file, settings) for part, file in given.items() if file is not None}
    place = _locate_folder(source, revision, [part for part in parts if part not in found], settings)
    names = {part: name for part, (_, name) in found.items() if name}
    return replace(place, files={part: path for part, (path, _) in found.items()}, names=names)


def _is_single(source: str | os.PathLike[str]) -> bool:
    """Whether a model is given as one file: one that is here, or is named as one on the hub."""
    try:
        path = Path(source).expanduser()
        is_there, is_file = path.exists(), path.is_file()
    except (RuntimeError, TypeError, ValueError, OSError):
        return False
    if is_there:
        return is_file and path.suffix.lower() in SUFFIXES
    return named_on_hub(source, _HUB_FILE) is not None


def _model_around(source: str | os.PathLike[str], given: Mapping[str, object], variant: str | None) -> str:
    """The model that has all that a transformer in one file lacks."""
    if given["transformer"] is not None:
        raise CheckpointError(
            f"the model is a file, {source}, and another is given as its transformer; name the model that all else is "
            "from, like 'turbo' or 'base'"
        )
    if variant is None:
        raise CheckpointError(
            f"{source} is the file of a transformer, which does not say which model it is: give variant='base' or "
            "variant='turbo', or name the model that all else is from, and this file as its transformer"
        )
    return get_variant(variant).hub_id


def _locate_file(part: str, file: str | os.PathLike[str], settings: dict[str, Any]) -> tuple[Path, str | None]:
    """The file of a component, and its name if it is on the hub."""
    try:
        path = Path(file).expanduser()
        is_there = path.exists()
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{part} must be a file, got {shown(file)}: {reason(error)}") from error
    match = None if is_there else named_on_hub(file, _HUB_FILE)
    if match:
        repository = Repository(match[1], revision=None, **settings)
        with or_here(str(file)):
            return repository.require(match[2], "see which files it has on its page"), str(file)
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        came = "is missing" if not is_there else "is a folder" if path.is_dir() else "is of another kind"
        raise CheckpointError(
            f"{part} must be a {' or '.join(SUFFIXES)} file, here or on the hub ('owner/name/file.gguf'), and "
            f"{shown(str(file))} {came}"
        )
    return path, None


def _locate_folder(
    source: str | os.PathLike[str], revision: str | None, parts: Sequence[str], settings: dict[str, Any]
) -> Location:
    if isinstance(source, str) and source in DEMOS:
        place = _local(Path(__file__).parent.parent / "demo" / source, revision)
        return replace(place, demo=source)
    if isinstance(source, str) and source in VARIANTS:
        source = VARIANTS[source].hub_id
    elif not isinstance(source, str) or _is_path(source):
        return _local(source, revision)
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"cannot find the model {shown(source)}: there is no such folder here, and it is no hub id; give "
            f"{_ALIASES}, a folder, or a hub id like {VARIANTS['turbo'].hub_id!r}"
        )
    return _download(Repository(source, revision=revision, **settings), parts)


def is_cached(hub_id: str, cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether a repository's configs and weights are whole in the cache; asks no hub."""
    try:
        locate(hub_id, cache_dir=cache_dir, local_files_only=True)
    except (CheckpointError, OSError, ValueError):  # huggingface_hub's, of a cache that cannot be read
        return False
    return True


_ALIASES = ", ".join(map(repr, [*VARIANTS, *DEMOS]))


def _is_path(source: str) -> bool:
    if source.startswith((".", "/", "~", "\\")) or source.lower().endswith(_SINGLE_FILES):
        return True
    return source.count("/") > 1 or "\\" in source or os.path.isabs(source) or os.path.lexists(source)


def _local(source: str | os.PathLike[str], revision: str | None) -> Location:
    try:
        folder = Path(source).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"a model is {_ALIASES}, a folder or a hub id, got {shown(source)}: {reason(error)}"
        ) from error
    if not is_folder and (is_there or folder.suffix.lower() in _SINGLE_FILES):
        came = f"got the file {folder}" if is_there else f"there is no file {folder}"
        raise CheckpointError(
            f"a model is a folder in the hub's layout, or a transformer in one {' or '.join(SUFFIXES)} file; {came}"
        )
    if not is_folder:
        raise CheckpointError(
            f"there is no folder {folder}; give one with model_index.json in it, {_ALIASES}, or a hub id"
        )
    if revision is not None:
        raise CheckpointError(f"revision={revision!r} has no meaning for the folder {folder}; leave it out")
    return Location(folder=folder)


def _download(repository: Repository, parts: Sequence[str]) -> Location:
    folder = repository.require(MODEL_INDEX.as_posix()).parent
    read_model_index(folder)  # a foreign repository is known by now, and nothing else of it is fetched
    # The cache keeps each commit in a folder of its name: what follows comes from the same commit as the first file.
    repository.revision = folder.name
    repository.require(SCHEDULER.as_posix())
    for component in PARTS:
        repository.require(f"{component}/config.json")
    _fetch_tokenizer(repository)
    problems = Problems()
    read_configs(folder, problems)
    if problems.errors:
        raise problems.errors[0]
    for component in parts:
        _fetch_weights(repository, component)
    return Location(folder=folder, hub_id=repository.hub_id, revision=folder.name)


def _fetch_tokenizer(repository: Repository) -> None:
    """Files that older tokenizers have are asked for only where newer ones do not stand in their place."""
    folder = Path("tokenizer")
    found = {name: repository.fetch((folder / name).as_posix()) for name in TOKENIZER_FILES}
    config = found["tokenizer_config.json"]
    older = LEGACY_TOKENIZER_FILES if found["tokenizer.json"] is None else ()
    template = (TEMPLATE_FILE,) if config is None or "chat_template" not in read_config(config) else ()
    for name in (*older, *template):
        repository.fetch((folder / name).as_posix())


def _fetch_weights(repository: Repository, component: str) -> None:
    single = f"{component}/{single_name(component)}"
    if repository.cached(single):
        return  # without asking for an index: that would wait for a hub that cannot be reached
    index = repository.fetch(f"{component}/{index_name(component)}")
    if index is None:
        repository.require(single)
        return
    for shard in sorted(set(read_index(index).values())):
        repository.require(f"{component}/{shard}")
