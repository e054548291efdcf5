"""Which safetensors files hold a component's weights, and whether they hold exactly the tensors that it needs.

A component has one file, or several with an index that says which tensor is where. All is decided from names and
headers, before any value is read. Knows no torch: what a component needs comes as a mapping of names to shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..memory.sizes import FLOAT8, GGML_BLOCKS
from .headers import Entry, Header, read_header
from .reading import MAX_INDEX, exists, read_json, shown

Shape = tuple[int, ...]

READ = ("F64", "F32", "F16", "BF16", *FLOAT8, *GGML_BLOCKS)
"""The types of tensors that are read; those in 8 bits may have a scale."""

_STEMS = {
    "text_encoder": "model",
    **dict.fromkeys(("transformer", "vae", "controlnet"), "diffusion_pytorch_model"),
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_SHARDS = 1000
_EXAMPLES = 5


@dataclass(frozen=True)
class Weights:
    """A component's files: the headers, in the order of the files' names."""

    headers: tuple[Header, ...]

    @property
    def entries(self) -> dict[str, Entry]:
        """All tensors of all files by name."""
        return {name: entry for header in self.headers for name, entry in header.entries.items()}


def single_name(component: str) -> str:
    """The file of a component whose weights are in one file."""
    return f"{_STEMS[component]}.safetensors"


def index_name(component: str) -> str:
    """The file that lists the shards of a component whose weights are in several."""
    return f"{_STEMS[component]}.safetensors.index.json"


def read_index(path: Path) -> dict[str, str]:
    """The index at `path`: the file name of each tensor. Names that could lead out of the folder are refused."""
    weight_map = read_json(path, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must say which file holds each tensor, got {shown(weight_map)}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or len(name) > 200 or not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(
                f"{path}: {shown(tensor)} should be in a .safetensors file beside the index, got {shown(name)}; "
                "only plain file names are followed"
            )
    if len(set(weight_map.values())) > _MAX_SHARDS:
        raise CheckpointError(f"{path} names {len(set(weight_map.values()))} files, at most {_MAX_SHARDS} are read")
    return weight_map


def read_weights(folder: Path, component: str) -> Weights:
    """The headers of all files with weights of `component` in the checkpoint `folder`, consistent with the index."""
    return read_place(folder / component, component)


def read_place(place: Path, component: str) -> Weights:
    """The same of the folder that holds the component itself."""
    single, index = place / single_name(component), place / index_name(component)
    if exists(single) and exists(index):
        raise CheckpointError(f"{place} has both {single.name} and {index.name}; remove the one that is not meant")
    if exists(index):
        return _read_shards(index)
    if exists(single):
        return Weights((read_header(single),))
    raise CheckpointError(_no_weights(place, component))


def match(
    place: Path,
    component: str,
    weights: Weights,
    needed: Mapping[str, Shape],
    spare: Mapping[str, Shape],
) -> None:
    """Raise one `CheckpointError` that lists every way in which the tensors at `place` are not those that are needed.

    `place` is the folder of the files. Tensors in `spare` may be there or not; they are not read.
    """
    entries, allowed = weights.entries, {**spare, **needed}
    missing = [name for name in needed if name not in entries]
    unexpected = [name for name in entries if name not in allowed]
    misshapen = [name for name in entries if name in allowed and entries[name].shape != tuple(allowed[name])]
    mistyped = [name for name in entries if name in needed and entries[name].dtype not in READ]
    problems = [
        *_listed("missing", missing, lambda name: f" {list(needed[name])}"),
        *_listed("unexpected", unexpected, lambda name: f" {list(entries[name].shape)}"),
        *_listed("misshapen", misshapen, lambda name: f" {list(entries[name].shape)} for {list(allowed[name])}"),
        *_listed("not of a floating-point type", mistyped, lambda name: f" {entries[name].dtype}"),
    ]
    if problems:
        files = ", ".join(map(_called, weights.headers[:3]))
        more = f" and {len(weights.headers) - 3} more" if len(weights.headers) > 3 else ""
        advice = "weights quantised so are not read; " if mistyped else ""
        raise CheckpointError(
            f"{place}: the tensors in {files}{more} are not those of the {component} that config.json "
            f"describes: {'; '.join(problems)}; {advice}take config.json and weights from the same model"
        )


def _read_shards(index: Path) -> Weights:
    weight_map = read_index(index)
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not exists(index.parent / name)]
    if absent:
        listed = ", ".join(absent[:_EXAMPLES])
        raise CheckpointError(
            f"{index.parent} lacks {len(absent)} of the {len(names)} files that {index.name} names: {listed}; "
            "download or copy them again"
        )
    headers = tuple(read_header(index.parent / name) for name in names)
    found = [(tensor, header.path.name) for header in headers for tensor in header.entries]
    places = dict(found)
    doubled = sorted({tensor for tensor, place in found if places[tensor] != place})
    held = {header.path.name: header.entries for header in headers}
    lost = [tensor for tensor, place in weight_map.items() if tensor not in held[place]]
    unlisted = [tensor for tensor, place in found if weight_map.get(tensor) != place and tensor not in doubled]
    problems = [
        *_listed("in more than one file", doubled, lambda tensor: f" (also in {places[tensor]})"),
        *_listed("not where the index says", lost, lambda tensor: f" (not in {weight_map[tensor]})"),
        *_listed("not in the index", unlisted, lambda tensor: f" (in {places[tensor]})"),
    ]
    if problems:
        raise CheckpointError(
            f"{index} does not agree with its files: {'; '.join(problems)}; download or copy them again"
        )
    return Weights(headers)


def _called(header: Header) -> str:
    return f"{header.path.name} (of {shown(header.architecture)})" if header.architecture else header.path.name


def _listed(what: str, names: list[str], detail: Callable[[str], str]) -> list[str]:
    if not names:
        return []
    examples = ", ".join(f"{shown(name)}{detail(name)}" for name in names[:_EXAMPLES])
    more = ", …" if len(names) > _EXAMPLES else ""
    return [f"{len(names)} {what}: {examples}{more}"]


def _no_weights(place: Path, component: str) -> str:
    try:
        names = sorted(path.name for path in place.iterdir())
    except OSError:
        return f"{place} is missing; a checkpoint has its {component} there"
    wanted = f"{single_name(component)} or {index_name(component)}"
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    if pickles:
        return (
            f"{place} has its weights in {shown(pickles[0])} only, and pickles are never read, because they can run "
            "code; convert them to safetensors where you trust them"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    came = f"only {', '.join(map(shown, others[:_EXAMPLES]))}" if others else "no safetensors file"
    return f"{place} should have {wanted} and has {came}"
