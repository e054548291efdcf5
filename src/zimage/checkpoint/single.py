"""A component in one file, safetensors or GGUF, whoever wrote it.

Names become ours. In the published naming a transformer's queries, keys and values are one matrix; since rows lie one
after the other, its parts are tensors of the same file: nothing is converted, entries get other names and places. So do
8-bit floats with their scales, in both of ComfyUI's ways to write them. Knows names and shapes, not values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError
from ..memory.sizes import FLOAT8
from .gguf import PLAIN_BYTES, is_gguf, read_gguf_header
from .headers import Entry, Header, read_header
from .names import bare_name, is_pointwise, own_name
from .reading import shown
from .shards import Weights, read_weights

SUFFIXES = (".safetensors", ".gguf")
FUSED, PARTS_OF_FUSED = ".attention.qkv.", ("to_q", "to_k", "to_v")

_SCALES = (".scale_weight", ".weight_scale")
"""How a scale is called, beside `.weight`: before and since ComfyUI had more than one way to store weights."""
_UNREAD = (".scale_input", ".input_scale", ".comfy_quant")
"""Of 8-bit floats, what says how activations would be rounded, and the format, which types and shapes say too."""
_MARKER = "scaled_fp8"
_ADAPTER = re.compile(r"(?:^|[._])(?:lora|lokr|hada|oft)[._]")
_TEXT_ENCODERS = ("qwen3",)


def read_component(folder: Path, component: str, files: Mapping[str, Path]) -> Weights:
    """The headers of a component's files in the checkpoint `folder`, of its own file if `files` has one."""
    return read_single(files[component], component) if component in files else read_weights(folder, component)


def read_single(path: Path, component: str) -> Weights:
    """The tensors in the file of a component, by our names; raises `CheckpointError` naming it."""
    header = read_any(path)
    _require_kind(header, component)
    entries: dict[str, Entry] = {}
    for name, entry in _with_scales(header, component).items():
        for part_name, part in _own(component, name, entry):
            if part_name in entries:
                raise CheckpointError(f"{path} has {part_name} twice, in two ways of naming; take another file")
            entries[part_name] = part
    return Weights((replace(header, entries=entries),))


def read_any(path: Path) -> Header:
    """The header of a safetensors or GGUF file, told apart by how it begins; raises `CheckpointError` naming it."""
    return read_gguf_header(path) if is_gguf(path) else read_header(path)


def adapter_tensor(header: Header) -> str | None:
    """The first tensor that is called as those of a LoRA or the like are."""
    return next((name for name in header.entries if _ADAPTER.search(name)), None)


def _require_kind(header: Header, component: str) -> None:
    """Raises `CheckpointError` where the file says by itself that it is something else."""
    called = component.replace("_", " ")
    adapter = adapter_tensor(header)
    if adapter is not None:
        raise CheckpointError(
            f"{header.path} is a LoRA or the like and no {called}: it has {shown(adapter)}; load the model and then "
            "this file with pipe.load_adapter(), on the command line --lora"
        )
    if component == "text_encoder" and header.architecture not in (None, *_TEXT_ENCODERS):
        raise CheckpointError(
            f"{header.path} is of {shown(header.architecture)}, and the text encoder of Z-Image is of 'qwen3'; take a "
            "GGUF file of Qwen3-4B"
        )


def _with_scales(header: Header, component: str) -> dict[str, Entry]:
    """The tensors of a component by their bare names, each with its scale."""
    found: dict[str, Entry] = {}
    for name, entry in header.entries.items():
        bare = bare_name(component, name)
        if bare is None or bare == _MARKER or bare.endswith(_UNREAD):
            continue
        if bare in found:
            raise CheckpointError(f"{header.path} has {bare} twice, after two prefixes; take another file")
        found[bare] = entry
    for name in [name for name in found if name.endswith(_SCALES)]:
        weight, scale = f"{name.rpartition('.')[0]}.weight", found[name]
        target = found.get(weight)
        if target is None or target.dtype not in (*FLOAT8, *PLAIN_BYTES):
            continue  # of what is not read anyway; it is listed as unexpected
        rows = target.shape[0] if target.shape else 1
        if target.scale is not None or scale.dtype not in PLAIN_BYTES or scale.shape not in _scale_shapes(rows):
            raise CheckpointError(
                f"{header.path} scales {shown(weight)} by {scale.dtype} {list(scale.shape)}; read are one number for "
                f"the whole or one for each of its {rows} rows: take a file in bfloat16 or plain fp8"
            )
        found[weight] = replace(target, scale=scale)
        del found[name]
    return found


def _scale_shapes(rows: int) -> tuple[tuple[int, ...], ...]:
    return (), (1,), (1, 1), (rows,), (rows, 1)


def _own(component: str, name: str, entry: Entry) -> list[tuple[str, Entry]]:
    """Our names for a tensor, with the part of it that each has."""
    name = own_name(component, name)
    if name.endswith("_pad_token") and len(entry.shape) == 1:
        entry = replace(entry, shape=(1, *entry.shape))  # some writers of GGUF leave such dimensions out
    if component == "vae" and is_pointwise(name) and entry.shape[2:] == (1, 1):
        entry = replace(entry, shape=entry.shape[:2])
    if component != "transformer" or FUSED not in name or not entry.shape or entry.shape[0] % 3:
        return [(name, entry)]
    return [
        (name.replace(FUSED, f".attention.{part}."), _third(entry, number))
        for number, part in enumerate(PARTS_OF_FUSED)
    ]


def _third(entry: Entry, number: int) -> Entry:
    """A third of the rows of a tensor, and of its scales if each row has one."""
    rows, count, scale = entry.shape[0] // 3, (entry.end - entry.start) // 3, entry.scale
    return replace(
        entry,
        shape=(rows, *entry.shape[1:]),
        start=entry.start + number * count,
        end=entry.start + (number + 1) * count,
        scale=_third(scale, number) if scale is not None and scale.shape[:1] == entry.shape[:1] else scale,
    )
