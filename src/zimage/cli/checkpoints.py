"""`zimage variants` and `zimage inspect`: which models there are, and what a folder or a file holds. Draws nothing."""

from __future__ import annotations

import json as json_format
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..variants import VARIANTS, Variant
from .options import Json

if TYPE_CHECKING:
    from ..checkpoint.identify import FilePart
    from ..checkpoint.inspect import Inspection

_OPTIONS = {
    "transformer": "--transformer",
    "text_encoder": "--text-encoder",
    "vae": "--vae",
    "adapter": "--lora",
    "controlnet": "--controlnet",
}
"""What takes a file that holds such a part."""


def variants(json: Json = False) -> None:
    """List the models and what they are for."""
    if json:
        for variant in VARIANTS.values():
            print(json_format.dumps({**asdict(variant), "evaluations": variant.evaluations}))
        return
    header = ("name", "model", "steps", "guidance", "evaluations", "negative prompt", "hub id")
    print(table([header, *map(_row, VARIANTS.values())]))
    for variant in VARIANTS.values():
        print(f"\n{variant.name}: {variant.advice}")


def inspect(
    model: Annotated[
        str, typer.Argument(help="A folder in the hub's layout, a file with weights, or a model that is here.")
    ],
    json: Json = False,
) -> None:
    """Say what a checkpoint holds: that of a folder, of `demo` or `demo-turbo`, or of a name or hub id in the cache.

    With the shift stand the sampler and the guidance that it names of its own. Of a file, safetensors or GGUF, it says
    which components are in it, or that it is a LoRA or a ControlNet, and the option of `generate` that takes it.
    Nothing is loaded or downloaded. Exit code 1 if there are problems, 0 if it will load.
    """
    if os.path.isfile(model):
        _inspect_file(model, json)
        return
    from ..checkpoint.inspect import inspect_checkpoint
    from ..checkpoint.locate import locate

    if os.path.lexists(model):
        found = inspect_checkpoint(model)
    else:
        place = locate(model, local_files_only=True)
        found = inspect_checkpoint(place.folder, hub_id=place.hub_id)
    if json:
        print(json_format.dumps(found.to_dict()))
    else:
        _print_inspection(found)
    if found.problems:
        raise typer.Exit(1)


def _inspect_file(file: str, json: bool) -> None:
    from ..checkpoint.identify import identify

    parts = identify(file)
    if json:
        described = [{**asdict(part), "option": _OPTIONS[part.kind]} for part in parts]
        print(json_format.dumps({"file": file, "parts": described}))
        return
    print(table([("holds", "parameters", "size", "types", "option"), *map(_file_row, parts)]))


def _file_row(part: FilePart) -> tuple[str, ...]:
    size, types = f"{part.bytes / 2**20:.1f} MiB", ", ".join(part.dtypes)
    return part.kind, f"{part.parameters:,}", size, types, _OPTIONS[part.kind]


def _print_inspection(found: Inspection) -> None:
    schedule = "" if found.shift is None else f" (shift {found.shift:g}{_own(found)})"
    print(f"variant: {found.variant}{schedule}" if found.variant else f"variant: unknown: {found.variant_reason}")
    rows = [("component", "class", "parameters", "size", "types", "files")]
    for part in found.components:
        size = f"{part.bytes / 2**20:.1f} MiB"
        types = ", ".join(part.dtypes)
        rows.append((part.name, part.class_name or "", f"{part.parameters:,}", size, types, str(len(part.shards))))
    print(table(rows))
    print(f"fingerprint: {found.fingerprint or 'unknown'}")
    for problem in found.problems:
        print(f"problem: {problem}")


def _own(found: Inspection) -> str:
    sampler = "" if found.sampler is None else f", sampler {found.sampler}"
    return sampler if found.guidance_scale is None else f"{sampler}, guidance {found.guidance_scale:g}"


def _row(variant: Variant) -> tuple[str, ...]:
    return (
        variant.name,
        variant.title,
        str(variant.num_inference_steps),
        f"{variant.guidance_scale:g}",
        str(variant.evaluations),
        "yes" if variant.supports_guidance else "no",
        variant.hub_id,
    )


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows in columns as wide as their widest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
