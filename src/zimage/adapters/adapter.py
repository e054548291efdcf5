"""An adapter in memory: for each layer a product of two thin matrices, and a report of what became of a file's keys.

`match` makes it from named tensors, or raises `AdapterError` and makes nothing. Knows the names and shapes of a
model's layers, not the model; no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.reading import shown
from ..errors import AdapterError
from .naming import ALPHA, DOWN, MAGNITUDE, UP, Key, is_of_text_encoder, layer_names, other_kind, read_key
from .origin import architecture_of_keys

EXAMPLES = 5
"""Keys that a message names."""

Shape = tuple[int, int]
"""Of a layer's weight: out, in."""
Group = dict[str, Key]
"""The keys of one layer, or of some that are fused, by part."""


@dataclass(frozen=True, eq=False)
class Delta:
    """What an adapter adds to the weight (out, in) of a layer: `scale * up @ down`.

    `down` is (rank, in), `up` (out, rank). With a `magnitude` (out,) the sum is then given rows of that length: DoRA
    (arXiv 2402.09353, eq. 5). On the host, as the file has them.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What became of the keys of a LoRA file.

    `matched` are those that act, `modules` the layers that they act on; `unmatched` those of no layer here, or of what
    cannot act on one; `misshapen` those of a layer of another shape, with both shapes.
    """

    modules: tuple[str, ...]
    matched: tuple[str, ...]
    unmatched: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} keys matched, on {len(self.modules)} layers"]
        for what, keys in (("unmatched", self.unmatched), ("misshapen", self.misshapen)):
            lines += [f"{len(keys)} {what}: {listed(keys)}"] if keys else []
        return "\n".join(lines)


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """A LoRA that fits a model: what it adds by name of the layer, where it is from, and the SHA-256 of its file."""

    source: str
    digest: str
    deltas: Mapping[str, Delta]
    report: AdapterReport
    variant: str | None = None
    """What it was trained for, where its file tells."""


@dataclass(frozen=True)
class Scaling:
    """What stands for alpha where a file has none of its own: PEFT's config. `by_module` are exceptions by the end of a
    layer's name, or after ^ by all of it, of which the first counts, as in PEFT."""

    alpha: float | None = None
    by_module: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False
    """Divided by the root of the rank (arXiv 2312.03732) and not by the rank."""

    def factor(self, module: str, own: float | None, rank: int) -> float:
        """What `up @ down` is multiplied with; `own` is the alpha in the file."""
        if own is not None:
            return own / rank
        alpha = next((alpha for name, alpha in self.by_module.items() if _is_named(name, module)), self.alpha)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.by_root else rank)


def examine(shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, Shape]) -> tuple[AdapterReport, list[Group]]:
    """What becomes of tensors of these names and shapes on a model with these `layers`; and those that act, by layer.

    Some files have a layer twice, fused with others and on its own: then what is fused counts as unmatched.
    """
    table = layer_names(layers)
    groups: dict[str, Group] = {}
    for name in shapes:
        key = read_key(name, table)
        if key is not None:
            groups.setdefault(key.stem, {}).setdefault(key.part, key)
    matched: list[Key] = []
    misshapen: dict[str, str] = {}
    used: list[Group] = []
    taken: set[str] = set()
    for group in sorted(groups.values(), key=lambda group: (not {DOWN, UP} <= set(group), len(_modules(group)))):
        if taken.intersection(_modules(group)):
            continue
        taken.update(_modules(group))
        wrong = _misshapen(group, shapes, layers)
        misshapen |= wrong
        matched += [key for key in group.values() if key.name not in wrong]
        used.append(group)
    names = {key.name for key in matched}
    report = AdapterReport(
        modules=tuple(sorted({module for key in matched for module in key.modules})),
        matched=tuple(name for name in shapes if name in names),
        unmatched=tuple(name for name in shapes if name not in names and name not in misshapen),
        misshapen=tuple(misshapen.values()),
    )
    return report, used


def require_use(report: AdapterReport, where: str) -> None:
    """Raise `AdapterError` where a file with this report cannot be attached as it is."""
    kinds = sorted({kind for name in report.unmatched if (kind := other_kind(name))})
    if kinds:
        raise AdapterError(f"{where} is a {' and '.join(kinds)} adapter; LoRA and DoRA are read: convert it to LoRA")
    foreign = architecture_of_keys(report.unmatched)
    if report.misshapen:
        raise AdapterError(
            f"{where} was made for layers of other shapes than this model's: {len(report.misshapen)} of its keys do "
            f"not fit, such as {', '.join(report.misshapen[:EXAMPLES])}; take a LoRA for Z-Image"
        )
    if not report.matched:
        found = f"; it looks like one for {foreign}" if foreign else ""
        raise AdapterError(
            f"{where} has no LoRA for a layer of Z-Image: none of its {len(report.unmatched)} keys matches, such as "
            f"{listed(report.unmatched) or 'nothing at all'}{found}; take a LoRA for Z-Image"
        )
    if foreign:
        raise AdapterError(f"{where} was made for {foreign}: it has keys such as {listed(report.unmatched)}")


def match(
    tensors: Mapping[str, Tensor], layers: Mapping[str, Shape], where: str, scaling: Scaling | None = None
) -> tuple[dict[str, Delta], AdapterReport]:
    """What the tensors of a file, named `where` in errors, add to each layer.

    Raises `AdapterError` where none is for a layer of this model, one has another shape or is not finite, or the
    adapter is of a kind that is not read.
    """
    report, groups = examine({name: tuple(tensor.shape) for name, tensor in tensors.items()}, layers)
    require_use(report, where)
    deltas: dict[str, Delta] = {}
    for group in groups:
        parts = {part: _checked(tensors[key.name], key, where) for part, key in group.items()}
        modules, own = _modules(group), float(parts[ALPHA].reshape(())) if ALPHA in parts else None
        down, up = (parts[part].reshape(parts[part].shape[:2]) for part in (DOWN, UP))
        magnitude = parts[MAGNITUDE].reshape(-1).chunk(len(modules)) if MAGNITUDE in parts else (None,) * len(modules)
        for module, rows, lengths in zip(modules, up.chunk(len(modules)), magnitude, strict=True):
            scale = (scaling or Scaling()).factor(module, own, len(down))
            if not bool(torch.isfinite(down.float() * scale).all()):
                raise AdapterError(
                    f"{where}: {shown(group[DOWN].name)} is not finite in float32 once it is multiplied by "
                    f"alpha / rank, {scale:g}; the file is damaged"
                )
            deltas[module] = Delta(down, rows, scale, lengths)
    return dict(sorted(deltas.items())), report


def unmatched_notice(report: AdapterReport, where: str) -> str:
    """What to warn of where a file has keys that do not act, "" if it has none."""
    if not report.unmatched:
        return ""
    texts = [name for name in report.unmatched if is_of_text_encoder(name)]
    others = [name for name in report.unmatched if not is_of_text_encoder(name)]
    parts = [f"{len(texts)} are for a text encoder, which is not adapted"] if texts else []
    parts += [f"{len(others)} are of no layer or part that is known, such as {listed(others)}"] if others else []
    return f"of the keys in {where} {len(report.matched)} act; {' and '.join(parts)}"


def listed(keys: tuple[str, ...] | list[str]) -> str:
    """Some of the keys, as a message has them."""
    return ", ".join(map(shown, keys[:EXAMPLES])) + (", …" if len(keys) > EXAMPLES else "")


def _is_named(name: str, module: str) -> bool:
    whole = name.strip("^$")
    return module == whole or (not name.startswith("^") and module.endswith(f".{whole}"))


def _modules(group: Group) -> tuple[str, ...]:
    return next(iter(group.values())).modules


def _misshapen(group: Group, shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, Shape]) -> dict[str, str]:
    """What is wrong with the parts of a layer, by key."""
    missing = [part for part in (DOWN, UP) if part not in group]
    if missing:
        return {key.name: f"{shown(key.name)} without lora_{missing[0]}" for key in group.values()}
    out, features = sum(layers[module][0] for module in _modules(group)), layers[_modules(group)[0]][1]
    rank = (*shapes[group[DOWN].name], 0)[0]
    wrong = {}
    for part, key in group.items():
        wanted = {DOWN: (max(1, rank), features), UP: (out, max(1, rank)), MAGNITUDE: (out,), ALPHA: ()}[part]
        came = shapes[key.name]
        # Linear layers that were kept as convolutions have axes of 1 behind.
        if came[: len(wanted)] != wanted or any(size != 1 for size in came[len(wanted) :]):
            wrong[key.name] = f"{shown(key.name)} {list(came)} for {list(wanted)}"
    return wrong


def _checked(tensor: Tensor, key: Key, where: str) -> Tensor:
    if not tensor.is_floating_point() and key.part != ALPHA:
        raise AdapterError(f"{where}: {shown(key.name)} is of the type {tensor.dtype}; take a file in float16 or wider")
    if not bool(torch.isfinite(tensor.float()).all()):  # adapters are computed in float32 and less
        raise AdapterError(
            f"{where}: {shown(key.name)} has values that are NaN, or infinite in float32; the file is damaged"
        )
    return tensor
