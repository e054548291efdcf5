"""Tensors as they will be written: what each is called and stored as in the hub's layout, ComfyUI's and GGUF files.

Each is made of one or several tensors of files, whose rows follow each other. Knows names, shapes and types; reads no
values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..errors import RequestError
from ..memory.ring import STAYS
from ..models.transformer import BLOCKS
from .gguf import PLAIN_BYTES
from .headers import Entry, Header
from .names import is_pointwise, other_name
from .shards import Shape, Weights
from .single import FUSED, PARTS_OF_FUSED

FLOAT8, Q8_0 = "F8_E4M3", "Q8_0"
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float8": FLOAT8, "q8_0": Q8_0}
"""What weights may be written as, by the names that users write."""
BYTES = {**PLAIN_BYTES, FLOAT8: 1}

_LAYERS = {"transformer": BLOCKS, "text_encoder": ("layers",), "vae": ()}
_Q8_BLOCK = 32


@dataclass(frozen=True)
class Outgoing:
    """A tensor as it will be written, and the `parts` of files that it is made of: the name and the entry there."""

    name: str
    dtype: str
    shape: Shape
    parts: tuple[tuple[Header, str, Entry], ...]

    @property
    def bytes(self) -> int:
        """How many it takes where it is stored as one of `BYTES`."""
        return math.prod(self.shape) * BYTES[self.dtype]


def for_hub(component: str, weights: Weights, dtype: str | None) -> list[Outgoing]:
    """In the hub's layout: our names, of a text encoder after "model."; `dtype` None keeps what is in full."""
    if dtype in (FLOAT8, Q8_0):
        raise RequestError(
            "a folder in the hub's layout has weights in bfloat16, float16 or float32; for fewer bits write a "
            ".safetensors or .gguf file"
        )
    has_prefix = component == "text_encoder" and not any(name.startswith("model.") for name in weights.entries)
    tensors = _tensors(weights, lambda name, entry: dtype or _kept(entry))
    return [replace(one, name=f"model.{one.name}" if has_prefix and one.name != "lm_head.weight" else one.name)
            for one in tensors]  # fmt: skip


def for_comfyui(component: str, weights: Weights, dtype: str | None) -> list[Outgoing]:
    """In ComfyUI's: a transformer's queries, keys and values are one matrix, a VAE's attention is convolutions."""
    if dtype == Q8_0 or (dtype == FLOAT8 and not _LAYERS[component]):
        raise RequestError(f"the {component} cannot be written to a .safetensors file in {_called(dtype)}")

    def stored(name: str, entry: Entry) -> str:
        if dtype != FLOAT8:
            return dtype or _kept(entry)
        return FLOAT8 if _is_narrowed(component, name, entry) else "BF16"

    tensors = _fused(_tensors(weights, stored)) if component == "transformer" else _tensors(weights, stored)
    return [
        replace(
            one,
            name=_renamed(component, one.name),
            shape=(*one.shape, 1, 1) if component == "vae" and is_pointwise(one.name) else one.shape,
        )
        for one in tensors
    ]


def for_gguf(weights: Weights, dtype: str | None) -> list[Outgoing]:
    """A transformer as others' GGUF files have it: what is no matrix is in float32, and with Q8_0 the matrices outside
    of the blocks are in bfloat16."""
    if dtype == FLOAT8:
        raise RequestError("a .gguf file has no float8; write bfloat16, float16, float32 or q8_0")

    def stored(name: str, entry: Entry) -> str:
        if len(entry.shape) < 2 or name.endswith("_pad_token"):
            return "F32"
        if dtype != Q8_0:
            return dtype or ("F32" if _kept(entry) == "F64" else _kept(entry))
        is_whole = entry.shape[-1] % _Q8_BLOCK == 0
        return Q8_0 if is_whole and _is_narrowed("transformer", name, entry) else "BF16"

    return [replace(one, name=_renamed("transformer", one.name)) for one in _fused(_tensors(weights, stored))]


def _tensors(weights: Weights, stored: Callable[[str, Entry], str]) -> list[Outgoing]:
    return [
        Outgoing(name, stored(name, entry), entry.shape, ((header, name, entry),))
        for header in weights.headers
        for name, entry in header.entries.items()
    ]


def _fused(tensors: list[Outgoing]) -> Iterator[Outgoing]:
    """Queries, keys and values as one, where the queries were; as the widest that one of them is stored as."""
    found = {one.name: one for one in tensors}
    for one in tensors:
        before, part, after = one.name.partition(".attention.to_")
        if not part or after.split(".")[0] not in ("q", "k", "v"):
            yield one
        elif after.startswith("q."):
            three = [found[f"{before}.attention.{part}.{after[2:]}"] for part in PARTS_OF_FUSED]
            yield Outgoing(
                f"{before}{FUSED}{after[2:]}",
                max((each.dtype for each in three), key=lambda dtype: BYTES.get(dtype, 0)),
                (sum(each.shape[0] for each in three), *one.shape[1:]),
                tuple(part for each in three for part in each.parts),
            )


def _renamed(component: str, name: str) -> str:
    """ComfyUI's name; a text encoder may have it already."""
    has_it = component == "text_encoder" and name.startswith(("model.", "lm_head."))
    return name if has_it else other_name(component, name)


def _is_narrowed(component: str, name: str, entry: Entry) -> bool:
    """Whether it is a matrix of the layers, modulations aside: what pictures depend on most is kept in full."""
    segments = name.removeprefix("model.").split(".")
    return len(entry.shape) == 2 and segments[0] in _LAYERS[component] and STAYS not in segments


def _kept(entry: Entry) -> str:
    """What a tensor is stored as where nothing else is asked for: what is in fewer bits becomes bfloat16."""
    return entry.dtype if entry.dtype in PLAIN_BYTES and entry.scale is None else "BF16"


def _called(dtype: str | None) -> str:
    return next((name for name, stored in STORED.items() if stored == dtype), str(dtype))
