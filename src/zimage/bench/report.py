"""What was measured, as a table for people and as JSON, and the file it is kept in. Loads no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomically


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One side of one stage."""

    median_s: float
    quartiles_s: tuple[float, float]
    times_s: tuple[float, ...]
    evaluations: int
    """Of the transformer, in each round; each branch of guidance is one."""
    prompts: int
    """Read by the text encoder, in each round."""
    tflops: float
    """10^12 operations that the stage asks for, a second."""
    product_share: float
    """Of the rate of a matrix product in the same run: model FLOPs utilisation."""
    peak_bytes: int | None
    """Most memory that was allocated on a CUDA device, the weights included."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage on both sides; `diffusers`, `ratio` and `cosine` are `None` where it was not measured."""

    name: str
    tflop: float
    """10^12 operations that it asks for."""
    zimage: Timing
    diffusers: Timing | None = None
    ratio: float | None = None
    """diffusers' median over zimage's."""
    cosine: float | None = None
    """Of both results, the lowest of all rounds."""
    step_cosine: float | None = None
    """Of the latents after each denoising step, both sides starting it from the same ones; the lowest of all."""

    @property
    def peaks(self) -> list[int]:
        """Bytes, of both sides, on a CUDA device."""
        sides = (self.zimage, self.diffusers)
        return [side.peak_bytes for side in sides if side is not None and side.peak_bytes is not None]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole measurement."""

    model: dict[str, Any]
    picture: dict[str, Any]
    rounds: int
    machine: dict[str, Any]
    versions: dict[str, str]
    date: str
    limits: dict[str, Any]
    stages: tuple[Stage, ...]
    attention: dict[str, dict[str, int]]
    """By side, what one evaluation's attention ran on; empty where denoising was not measured."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return json.loads(json.dumps(asdict(self)))

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def text(report: Report) -> str:
    """A line for each stage, then what the times mean."""
    model, picture, machine = report.model, report.picture, report.machine
    dtype = model["dtype"] + ("" if model["blocks"] == "eager" else f", blocks {model['blocks']}")
    dtype += f" (zimage's layers: {model['layers']})" if model["layers"] != "full" else ""
    guidance = f", guidance {picture['guidance_scale']:g}" if picture["guidance_scale"] else ""
    head = [
        f"{model['name']}, {model['variant']}: {picture['width']}x{picture['height']}, "
        f"{picture['steps']} steps{guidance}, {dtype} on {machine['name']}, {machine['threads']} threads",
        f"medians of {report.rounds} rounds (quartiles), both sides in turn, warm",
    ]
    return "\n".join([*head, *_table(report.stages), *_work(report)])


def save(report: Report, folder: Path) -> Path:
    """Write the report into `folder`, whole or not at all, and return the file, named for what was measured."""
    model, picture = report.model, report.picture
    parts = [
        "bench", Path(model["name"]).name, model["variant"], f"{picture['width']}x{picture['height']}",
        model["dtype"], *([] if model["blocks"] == "eager" else [model["blocks"]]),
        *([model["layers"]] if model["layers"] != "full" else []), report.machine["name"], report.date,
    ]  # fmt: skip
    name = "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)
    return write(report.to_dict(), folder, name)


def write(content: object, folder: Path, name: str) -> Path:
    """`content` as JSON in a file of `folder`, whole or not at all; a file of the same name is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    data = (json.dumps(content, indent=2) + "\n").encode()
    write_atomically(path, lambda file: file.write(data), overwrite=True)
    return path


def _table(stages: Sequence[Stage]) -> list[str]:
    rows = [("stage", "zimage", "diffusers", "ratio", "cosine", "evaluations", "zimage's TFLOP/s", "share")]
    for stage in stages:
        ours, theirs = stage.zimage, stage.diffusers
        rows.append(
            (
                stage.name,
                _timing(ours),
                "-" if theirs is None else _timing(theirs),
                "-" if stage.ratio is None else f"{stage.ratio:.2f}",
                "-" if stage.cosine is None else f"{stage.cosine:.6f}",
                _evaluations(ours, theirs),
                f"{ours.tflops:.3g}",
                f"{ours.product_share:.0%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def _work(report: Report) -> list[str]:
    limits = report.limits
    shapes = ", ".join(f"{shape} {rate:.3g}" for shape, rate in limits["products"].items())
    lines = [
        f"matrix product: {limits['product_tflops']:.3g} TFLOP/s ({shapes}); the share is of this",
        f"copy: {limits['copy_gbs']:.3g} GB/s, read and written",
    ]
    for stage in report.stages:
        if stage.step_cosine is not None:
            lines.append(f"each step of {stage.name} from the same latents: cosine {stage.step_cosine:.6f} or more")
    for side, seen in report.attention.items():
        lines.append(f"attention of {side}: {', '.join(f'{name} x {count}' for name, count in seen.items())}")
    peaks = [
        f"{stage.name} {' / '.join(f'{peak / 2**30:.2f}' for peak in stage.peaks)}"
        for stage in report.stages
        if stage.peaks
    ]
    if peaks:
        lines.append(f"peak memory in GiB, zimage / diffusers: {', '.join(peaks)}")
    return lines


def _evaluations(ours: Timing, theirs: Timing | None) -> str:
    if not ours.evaluations:
        return "-"
    return str(ours.evaluations) if theirs is None else f"{ours.evaluations} = {theirs.evaluations}"


def _timing(timing: Timing) -> str:
    scale, unit = (1.0, "s") if timing.median_s >= 1 else (1e3, "ms")
    low, high = (f"{one * scale:.4g}" for one in timing.quartiles_s)
    return f"{timing.median_s * scale:.4g} {unit} ({low} to {high})"
