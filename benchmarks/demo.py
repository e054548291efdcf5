"""What the models that come along can do: the tables and the plot of docs/demo.md, as the judge reads their pictures.

Captions are held out from training (`zimage.training.captions.evaluation_captions`); picture k has the seed k. Each
table is printed as it is done, and written to `--output` with the others. The whole takes about half an hour on two
cores.

    python benchmarks/demo.py --output benchmarks/results --plot docs/steps.svg
    python benchmarks/demo.py [--tables adherence,steps] [--count 240] [--models demo,demo-turbo]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zimage import GenerationRequest, ZImagePipeline
from zimage.cli.running import evaluations
from zimage.training import judge
from zimage.training.captions import evaluation_captions
from zimage.training.evaluate import Recipe, adherence, draw
from zimage.training.scenes import PALETTE
from zimage.training.world import CANVASES, SHAPES

Row = dict[str, Any]
SWEEP = 25
"""Steps of the tables that compare many settings of the base model."""
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 25, 50)
OPEN_SEEDS = 100


class Subject:
    """A model and its recipe."""

    def __init__(self, name: str) -> None:
        self.name, self.pipe = name, ZImagePipeline.from_pretrained(name, device="cpu")
        variant = self.pipe.variant
        self.recipe = Recipe(
            steps=variant.num_inference_steps, shift=self.pipe.shift, guidance_scale=variant.guidance_scale
        )

    def right(self, kind: str, language: str, count: int, **changes: Any) -> float:
        """The percentage of captions that are drawn as they say."""
        captions = evaluation_captions(kind, count, 0, language)
        return percent(adherence(self.pipe, captions, 0, replace(self.recipe, **changes)))

    def pictures(self, prompts: Sequence[str], **changes: Any) -> list[Any]:
        """A picture of each prompt."""
        return draw(self.pipe, prompts, range(len(prompts)), replace(self.recipe, **changes))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--count", type=int, default=240, help="captions of each kind and language")
    parser.add_argument("--models", default="demo,demo-turbo")
    parser.add_argument("--plot", type=Path, help="file for the plot of steps, .svg")
    parser.add_argument("--output", type=Path, help="folder for the figures, as JSON")
    arguments = parser.parse_args()
    subjects = [Subject(name) for name in arguments.models.split(",")]
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": str(subjects[0].pipe.dtype),
        "captions": arguments.count,
    }
    for name in arguments.tables.split(","):
        start = time.perf_counter()
        rows = TABLES[name](subjects, arguments.count)
        results[name] = rows
        print(f"\n{name} ({time.perf_counter() - start:.0f} s)\n\n{table(rows)}", flush=True)
        if name == "steps" and arguments.plot:
            arguments.plot.write_text(plot(rows))
        if arguments.output:
            file = arguments.output / f"demo-cpu-{date.today()}.json"
            file.write_text(json.dumps(results, indent=1) + "\n")


def of_adherence(subjects: Sequence[Subject], count: int) -> list[Row]:
    """Both kinds of captions in both languages, and the other two shapes of pictures."""
    return [
        {"model": subject.name, "captions": kind, "size": f"{canvas[0]} × {canvas[1]}"}
        | {language: subject.right(kind, language, count, canvas=canvas) for language in ("en", "zh")}
        for subject in subjects
        for kind in ("single", "pair")
        for canvas in (CANVASES if kind == "pair" else CANVASES[:1])
    ]


def of_guidance(subjects: Sequence[Subject], count: int) -> list[Row]:
    """Adherence of the base model against the guidance scale."""
    return [
        {"guidance": scale, "steps": SWEEP}
        | {kind: subjects[0].right(kind, "en", count, steps=SWEEP, guidance_scale=scale) for kind in ("single", "pair")}
        for scale in (0.0, 1.0, 2.0, 4.0, 6.0, 8.0)
    ]


def of_limits(subjects: Sequence[Subject], count: int) -> list[Row]:
    """What truncation and normalization of guidance change."""
    settings = [(1.0, 0.0), (0.75, 0.0), (0.5, 0.0), (0.25, 0.0), (1.0, 1.0), (1.0, 0.8)]
    rows = []
    captions = evaluation_captions("single", count, 0)
    for truncation, normalization in settings:
        changes = {"steps": SWEEP, "cfg_truncation": truncation, "cfg_normalization": normalization}
        drawn = subjects[0].pictures([text for text, _ in captions], **changes)
        wanted = [claims.objects[0].colour for _, claims in captions]
        request = GenerationRequest("", num_inference_steps=SWEEP, cfg_truncation=truncation)
        rows.append(
            {"cfg_truncation": truncation, "cfg_normalization": normalization}
            | {
                "evaluations": evaluations(subjects[0].pipe.resolve(request)),
                "pair": subjects[0].right("pair", "en", count, **changes),
            }
            | {"colour error": round(statistics.mean(map(colour_error, drawn, wanted)), 1)}
        )
    return rows


def of_negatives(subjects: Sequence[Subject], count: int) -> list[Row]:
    """How many pictures of captions that leave the colour open have something red."""
    captions = [text for text, _ in evaluation_captions("open", 2 * count, 0)]
    rows = []
    for negative in ("", "red", "红色", "blue"):
        readings = map(judge.read, subjects[0].pictures(captions, steps=SWEEP, negative_prompt=negative))
        colours = Counter(one.colour for reading in readings for one in reading.objects[:1])
        shares = {colour: percent(colours[colour] / len(captions)) for colour in ("red", "blue")}
        rows.append({"negative prompt": negative, "pictures": len(captions), "steps": SWEEP} | shares)
    return rows


def of_diversity(subjects: Sequence[Subject], count: int) -> list[Row]:
    """Bits of entropy of colour, ninth of the picture and size, over the seeds of a caption with a shape alone."""
    rows = []
    for subject in subjects:
        bits = []
        for shape in SHAPES:
            readings = map(judge.read, subject.pictures([f"a {shape} on a white background"] * OPEN_SEEDS))
            bits.append(entropy([outcome(reading) for reading in readings]))
        rows.append(
            {"model": subject.name, "entropy (bits)": round(statistics.mean(bits), 2)}
            | {shape: round(value, 2) for shape, value in zip(SHAPES, bits, strict=True)}
        )
    return rows


def of_steps(subjects: Sequence[Subject], count: int) -> list[Row]:
    """Adherence against steps, of all models."""
    return [
        {"steps": steps}
        | {
            f"{subject.name}, {kind}": subject.right(kind, "en", count, steps=steps)
            for subject in subjects
            for kind in ("single", "pair")
        }
        for steps in STEPS
    ]


def of_speed(subjects: Sequence[Subject], count: int) -> list[Row]:
    """Seconds of a picture, of a pipeline that is loaded and of the whole command."""
    with tempfile.TemporaryDirectory() as scratch:
        return [
            {
                "model": subject.name,
                "warm (s)": round(statistics.median([warm(subject, seed) for seed in range(12)][2:]), 3),
                "cold (s)": round(statistics.median([cold(subject, Path(scratch), seed) for seed in range(6)][1:]), 2),
            }
            for subject in subjects
        ]


TABLES: dict[str, Callable[[Sequence[Subject], int], list[Row]]] = {
    "adherence": of_adherence,
    "guidance": of_guidance,
    "limits": of_limits,
    "negatives": of_negatives,
    "diversity": of_diversity,
    "steps": of_steps,
    "speed": of_speed,
}


def colour_error(picture: Any, colour: str) -> float:
    """Mean distance of a picture's object from its colour as it is drawn, in grey levels of 255; 0 if there is none."""
    pixels = picture.astype(float)
    chroma = pixels.max(axis=2) - pixels.min(axis=2)
    inside = pixels[chroma > 0.6 * np.ptp(np.array(PALETTE[colour]))]
    return float(np.abs(inside - PALETTE[colour]).mean()) if len(inside) else 0.0


def outcome(reading: judge.Reading) -> tuple[Any, ...]:
    """What the caption left open: colour, ninth of the picture and size of the largest object."""
    if not reading.objects:
        return ()
    first = reading.objects[0]
    side = CANVASES[0][0] / 3
    return (first.colour, int(first.centre[0] // side), int(first.centre[1] // side), first.size)


def entropy(outcomes: Sequence[tuple[Any, ...]]) -> float:
    """In bits."""
    shares = [number / len(outcomes) for number in Counter(outcomes).values()]
    return -sum(share * math.log2(share) for share in shares)


def percent(share: float) -> float:
    """With one place."""
    return round(100 * share, 1)


def warm(subject: Subject, seed: int) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    subject.pipe("a red circle left of a blue square", seed=seed, progress=False)
    return time.perf_counter() - start


def cold(subject: Subject, folder: Path, seed: int) -> float:
    """Seconds of the command, from its start until it has ended."""
    file = folder / f"{subject.name}-{seed}.png"
    command = [sys.executable, "-m", "zimage", "generate", "a red circle left of a blue square", "--quiet"]
    start = time.perf_counter()
    subprocess.run([*command, "--model", subject.name, "--output", str(file)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


LINES = ("#1f6feb", "#1f6feb", "#d1570c", "#d1570c")
WIDE, HIGH, EDGE = 640, 320, 48


def plot(rows: Sequence[Row]) -> str:
    """Percentages against steps, on a logarithmic axis, as an SVG picture; every second line is dashed."""

    def at(steps: float, right: float) -> str:
        across = math.log(steps / STEPS[0]) / math.log(STEPS[-1] / STEPS[0])
        return f"{EDGE + across * (WIDE - 4 * EDGE):.1f},{HIGH - EDGE - right / 100 * (HIGH - 2 * EDGE):.1f}"

    def text(place: str, words: object, anchor: str, colour: str = "#666") -> str:
        left, top = place.split(",")
        return f'<text x="{left}" y="{top}" text-anchor="{anchor}" fill="{colour}">{words}</text>'

    parts = []
    for right in range(0, 101, 25):
        parts.append(f'<path d="M{at(STEPS[0], right)}L{at(STEPS[-1], right)}" stroke="#ccc"/>')
        parts.append(text(at(STEPS[0] * 0.95, right), f"{right} %", "end"))
    parts.extend(text(at(steps, -8), steps, "middle") for steps in STEPS)
    parts.append(text(at(7, -16), "steps", "middle"))
    for number, (name, colour) in enumerate(zip(list(rows[0])[1:], LINES, strict=False)):
        dash = ' stroke-dasharray="5 4"' if number % 2 else ""
        line = "L".join(at(row["steps"], row[name]) for row in rows)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(
            text(at(STEPS[-1] * 1.08, 95 - 9 * number), f"{name}{' (dashed)' if dash else ''}", "start", colour)
        )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{WIDE}" height="{HIGH}" fill="white"/>', *parts, "</svg>"]) + "\n"


def table(rows: Sequence[Row]) -> str:
    """Rows of one kind in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(map(str, row.values())) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
