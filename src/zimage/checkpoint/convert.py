"""Turns a checkpoint into another layout: the hub's folder, a file for ComfyUI, or a GGUF file of the transformer.

Tensor by tensor, from files to files, so that no model is ever in memory; what is there in the end is whole, or was
there before. Wires `locate`, `survey`, `outgoing` and `writing`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..files.atomic import check_target, write_atomically
from .configs import LEGACY_TOKENIZER_FILES, MODEL_INDEX, PARTS, SCHEDULER, TEMPLATE_FILE, TOKENIZER_FILES
from .folders import check_free, copy_file, target_path, whole_or_nothing
from .locate import locate
from .outgoing import STORED, Outgoing, for_comfyui, for_gguf, for_hub
from .reading import exists
from .save import shard_size
from .survey import Survey, survey
from .writing import write_gguf, write_safetensors, write_shards

_ARCHITECTURE = "lumina2"
"""What GGUF files of Z-Image say that they are: its layers are Lumina's, and that is what others look for."""
_COMFYUI, _GGUF = ".safetensors", ".gguf"

Report = Callable[[str], object]


@dataclass(frozen=True)
class _Goal:
    """What is asked for: `suffix` "" is a folder, whose `parts` are all."""

    target: Path
    suffix: str
    parts: tuple[str, ...]
    dtype: str | None

    def outgoing(self, part: str, found: Survey) -> list[Outgoing]:
        """The tensors of a component as they will be written."""
        weights = found.weights[part]
        if self.suffix == _GGUF:
            return for_gguf(weights, self.dtype)
        return (for_comfyui if self.suffix else for_hub)(part, weights, self.dtype)


def convert_checkpoint(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    part: str | None = None,
    dtype: str | None = None,
    transformer: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    report: Report = lambda sentence: None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Write `model` to `target` in another layout and return the path.

    A `target` that ends in .safetensors is a file with one `part` as ComfyUI names it ("transformer" if not given,
    "text_encoder", "vae"), one that ends in .gguf is a GGUF file of the transformer, any other is a folder in the hub's
    layout, for zimage and diffusers. `model`, the files, `variant`, `revision`, `cache_dir`, `token` and
    `local_files_only` mean what they do to `ZImagePipeline.from_pretrained`.

    `dtype` is "bfloat16", "float16", "float32", in .safetensors files also "float8" (e4m3, a scale for each matrix of
    the layers, the rest in bfloat16), in .gguf files also "q8_0". Left out, tensors keep theirs, and what a file has in
    fewer bits becomes bfloat16. `report` is told what is written, in sentences.

    With `overwrite` a file or a checkpoint folder at `target` is replaced, with all that is in it. Nothing is left of
    what fails. Raises `RequestError` for what cannot be asked for and `CheckpointError` for what cannot be read.
    """
    goal, shard_bytes = _goal(target_path(target), part, dtype), shard_size(max_shard_size)
    _check_files(goal, {"transformer": transformer, "text_encoder": text_encoder, "vae": vae})
    _check_target(goal, overwrite)
    place = locate(
        model,
        transformer=transformer,
        text_encoder=text_encoder,
        vae=vae,
        variant=variant,
        parts=goal.parts,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    found = survey(place.folder, place.files, goal.parts)
    found.require()
    tensors = {one: goal.outgoing(one, found) for one in goal.parts}
    for one, listed in tensors.items():
        kinds = ", ".join(sorted({tensor.dtype for tensor in listed}))
        report(f"{one}: {len(listed)} tensors in {kinds}")
    if goal.suffix:
        write_atomically(goal.target, lambda file: _write_file(file, goal, tensors[goal.parts[0]]), overwrite=overwrite)
        return goal.target
    with whole_or_nothing(goal.target, overwrite=overwrite) as folder:
        _copy_configs(found.folder, folder)
        for one, listed in tensors.items():
            write_shards(folder / one, one, listed, shard_bytes)
        survey(folder).require()
    return goal.target


def _goal(target: Path, part: str | None, dtype: str | None) -> _Goal:
    suffix = target.suffix.lower() if target.suffix.lower() in (_COMFYUI, _GGUF) else ""
    if dtype is not None and dtype not in STORED:
        raise RequestError(f"dtype must be {', '.join(STORED)}, or left out; got {dtype!r}")
    if part is not None and (part not in PARTS or not suffix):
        what = f"must be {', '.join(PARTS)}, got {part!r}" if suffix else "is for a .safetensors or .gguf file"
        raise RequestError(f"part {what}")
    if suffix == _GGUF and part not in (None, "transformer"):
        raise RequestError(f"only the transformer is written to GGUF files, got part={part!r}; write .safetensors")
    if target.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise RequestError(f"{target} would be a pickle, and those are never written; name it like model{_COMFYUI}")
    parts = (part or "transformer",) if suffix else PARTS
    return _Goal(target, suffix, parts, None if dtype is None else STORED[dtype])


def _check_files(goal: _Goal, files: Mapping[str, object]) -> None:
    idle = [one for one, file in files.items() if file is not None and one not in goal.parts]
    if idle:
        raise RequestError(
            f"a file for the {idle[0]} has no effect on one of the {goal.parts[0]}; leave it out, or ask for "
            f"part={idle[0]!r}"
        )


def _check_target(goal: _Goal, overwrite: bool) -> None:
    """Refuse before anything is read or downloaded."""
    check = check_target if goal.suffix else check_free
    try:
        check(goal.target, overwrite=overwrite)
    except RequestError as error:
        remedy = ""
        with suppress(RequestError):
            check(goal.target, overwrite=True)
            remedy = "; overwrite=True replaces it"
        raise RequestError(f"{error}{remedy}") from None


def _write_file(file: Any, goal: _Goal, tensors: list[Outgoing]) -> None:
    if goal.suffix == _GGUF:
        write_gguf(file, tensors, _ARCHITECTURE, goal.target.stem)
    else:
        write_safetensors(file, tensors, {"format": "pt"})


def _copy_configs(source: Path, folder: Path) -> None:
    """All that a checkpoint has beside weights, of the files that are known."""
    wanted = [MODEL_INDEX, SCHEDULER, *(Path(one, "config.json") for one in PARTS)]
    wanted += [Path("text_encoder", "generation_config.json")]
    wanted += [Path("tokenizer", name) for name in (*TOKENIZER_FILES, *LEGACY_TOKENIZER_FILES, TEMPLATE_FILE)]
    for path in wanted:
        if exists(source / path):
            (folder / path).parent.mkdir(exist_ok=True)
            copy_file(source / path, folder / path)
