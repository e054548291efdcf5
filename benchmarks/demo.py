"""What the models that come along can do: the tables and the plot of docs/demo.md, as the judge reads their pictures.

Captions are those of `zimage.training.captions.evaluation_captions`: "single" and "pair" in combinations held out from
training, each combination in several wordings; "open" leaves the colour open and holds nothing out. Picture k has the
seed k. Each table is printed when it is done, and goes into `--output` beside those that are there.

    python benchmarks/demo.py --output benchmarks/results --plot docs/steps.svg
    python benchmarks/demo.py [--tables adherence,steps] [--count 240] [--models demo]
"""

from __future__ import annotations

import argparse
import json
import math
import os
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
from zimage.training.world import CANVASES, SHAPES, Claims, ObjectClaim
from zimage.variants import DEMOS

Row = dict[str, Any]
Caption = tuple[str, Claims]
SWEEP = 25
"""Steps of the tables that compare many settings of the base model."""
LIMITED = 4.0
"""Guidance of the table of its limits: with as much as in the released model's recipe there is something to limit."""
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 25, 50)
OPEN_SEEDS = 100


class Subject:
    """A model and its recipe."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.pipe = name, ZImagePipeline.from_pretrained(name, device="cpu", **options)
        self.recipe = Recipe.of(self.pipe)

    def right(self, kind: str, language: str, count: int, **changes: Any) -> float:
        """The percentage of captions that are drawn as they say."""
        captions = evaluation_captions(kind, count, 0, language)
        return percent(adherence(self.pipe, captions, 0, replace(self.recipe, **changes)))

    def readings(self, captions: Sequence[Caption], **changes: Any) -> list[judge.Reading]:
        """What is seen in a picture of each caption."""
        return list(map(judge.read, self.pictures(captions, **changes)))

    def pictures(self, captions: Sequence[Caption], **changes: Any) -> list[Any]:
        """A picture of each caption."""
        recipe = replace(self.recipe, **changes)
        return draw(self.pipe, [text for text, _ in captions], range(len(captions)), recipe)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--count", type=int, default=240, help="captions of each kind and language")
    parser.add_argument("--models", default=",".join(DEMOS))
    parser.add_argument("--plot", type=Path, help="file for the plot of steps, .svg")
    parser.add_argument("--output", type=Path, help="folder for the figures, as JSON")
    arguments = parser.parse_args()
    names = arguments.tables.split(",")
    if unknown := set(names) - set(TABLES):
        parser.error(f"there are no tables {', '.join(sorted(unknown))}; choose from {', '.join(TABLES)}")
    subjects = [Subject(name) for name in arguments.models.split(",")]
    for name in names:
        start = time.perf_counter()
        rows = TABLES[name](subjects, arguments.count)
        print(f"\n{name} ({time.perf_counter() - start:.0f} s)\n\n{table(rows)}", flush=True)
        if name == "steps" and arguments.plot:
            arguments.plot.write_text(plot(rows))
        if arguments.output:
            keep(arguments.output, name, {"captions": arguments.count, **described(subjects), "rows": rows})


def described(subjects: Sequence[Subject]) -> Row:
    """What the figures depend on."""
    models = {
        one.name: {
            "fingerprint": one.pipe.model["fingerprint"],
            "dtype": str(one.pipe.dtype),
            "sampler": one.recipe.sampler,
            "guidance_scale": one.recipe.guidance_scale,
        }
        for one in subjects
    }
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "models": models,
    }


def keep(folder: Path, name: str, result: Row) -> None:
    """Put a table's figures into today's file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"demo-cpu-{date.today()}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(results | {name: result}, indent=1) + "\n")


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
    """Adherence against the guidance scale."""
    return [
        {"model": subject.name, "guidance": scale, "steps": SWEEP}
        | {kind: subject.right(kind, "en", count, steps=SWEEP, guidance_scale=scale) for kind in ("single", "pair")}
        for subject in guided(subjects)
        for scale in (0.0, 1.0, 2.0, 4.0, 6.0, 8.0)
    ]


def of_limits(subjects: Sequence[Subject], count: int) -> list[Row]:
    """What truncation and normalization of guidance change, where it is `LIMITED`."""
    settings = [(1.0, 0.0), (0.75, 0.0), (0.5, 0.0), (0.25, 0.0), (1.0, 1.0), (1.0, 0.8)]
    captions = evaluation_captions("single", count, 0)
    rows = []
    for subject in guided(subjects):
        for truncation, normalization in settings:
            limits = {"guidance_scale": LIMITED, "cfg_truncation": truncation}
            changes = {**limits, "steps": SWEEP, "cfg_normalization": normalization}
            request = GenerationRequest("", num_inference_steps=SWEEP, **limits)
            errors = [
                colour_error(picture, claims)
                for picture, (_, claims) in zip(subject.pictures(captions, **changes), captions, strict=True)
                if judge.agrees(judge.read(picture), claims)
            ]
            rows.append(
                {"model": subject.name, "cfg_truncation": truncation, "cfg_normalization": normalization}
                | {"evaluations": evaluations(subject.pipe.resolve(request))}
                | {"single": percent(len(errors) / count), "pair": subject.right("pair", "en", count, **changes)}
                | {"colour error of those right": round(statistics.mean(errors), 1) if errors else None}
            )
    return rows


def of_negatives(subjects: Sequence[Subject], count: int) -> list[Row]:
    """How many pictures of captions that leave the colour open have something of a colour, and are as asked."""
    captions = evaluation_captions("open", 2 * count, 0)
    rows = []
    for subject in guided(subjects):
        for negative in ("", "red", "红色", "blue"):
            readings = subject.readings(captions, steps=SWEEP, negative_prompt=negative)
            seen = [{one.colour for one in reading.objects} for reading in readings]
            right = [judge.agrees(reading, claims) for reading, (_, claims) in zip(readings, captions, strict=True)]
            rows.append(
                {"model": subject.name, "negative prompt": negative, "pictures": len(captions), "steps": SWEEP}
                | {colour: percent(sum(colour in one for one in seen) / len(seen)) for colour in ("red", "blue")}
                | {"as asked": percent(sum(right) / len(right))}
            )
    return rows


def of_diversity(subjects: Sequence[Subject], count: int) -> list[Row]:
    """Bits of entropy over 100 seeds of a caption that names a shape and the background, mean over the shapes.

    Of colour (8), ninth of the picture (9), size (2), and of all three at once, where 100 seeds can show 6.6 bits. Only
    pictures that are as asked are counted.
    """
    rows = []
    for subject, diversity in of_each_diversity(subjects):
        outcomes = []
        for shape in SHAPES:
            claims = Claims(objects=(ObjectClaim(shape=shape),), background="white")
            text = f"a {shape} on a white background"
            requests = [GenerationRequest(text, seed=seed, diversity=diversity) for seed in range(OPEN_SEEDS)]
            readings = [judge.read(one.image) for one in subject.pipe.generate_many(requests, progress=False)]
            outcomes.append([outcome(reading) for reading in readings if judge.agrees(reading, claims)])
        rows.append(
            {
                "model": subject.name,
                "diversity": diversity,
                "as asked": percent(sum(map(len, outcomes)) / len(SHAPES) / OPEN_SEEDS),
            }
            | {"all": mean_entropy(outcomes)}
            | {
                name: mean_entropy([[one[place] for one in seen] for seen in outcomes])
                for place, name in enumerate(("colour", "ninth", "size"))
            }
        )
    return rows


def of_each_diversity(subjects: Sequence[Subject]) -> list[tuple[Subject, float]]:
    """The base model as it is; Turbo, which needs it, with more as well."""
    return [
        (subject, diversity)
        for subject in subjects
        for diversity in ((0.0,) if subject.recipe.guidance_scale else (0.0, 0.5, 1.0, 2.0))
    ]


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


def of_weights(subjects: Sequence[Subject], count: int) -> list[Row]:
    """Adherence against what weights are stored as."""
    return [
        {"model": subject.name, "weights": weights, "steps": min(SWEEP, subject.recipe.steps)}
        | {kind: stored.right(kind, "en", count, steps=min(SWEEP, subject.recipe.steps)) for kind in ("single", "pair")}
        for subject in subjects
        for weights in ("full", "int8", "float8", "nf4")
        for stored in (Subject(subject.name, weight_dtype=weights),)
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
    "weights": of_weights,
    "speed": of_speed,
}


def guided(subjects: Sequence[Subject]) -> list[Subject]:
    """Those that know guidance and negative prompts."""
    return [subject for subject in subjects if subject.pipe.variant.supports_guidance]


def colour_error(picture: Any, claims: Claims) -> float:
    """How far the middle colour of the picture's object is from the claimed one as it is drawn, in levels of 255."""
    pixels = picture.astype(float)
    inside = pixels[np.ptp(pixels, axis=2) >= judge.SURE_CHROMA]
    return float(np.abs(np.median(inside, axis=0) - PALETTE[claims.objects[0].colour or ""]).mean())


def outcome(reading: judge.Reading) -> tuple[Any, ...]:
    """What the caption left open: colour, ninth of the picture and size of the object."""
    (only,) = reading.objects
    side = CANVASES[0][0] / 3
    return (only.colour, (int(only.centre[0] // side), int(only.centre[1] // side)), only.size)


def mean_entropy(outcomes: Sequence[Sequence[Any]]) -> float:
    """The mean of the entropies in bits."""
    return round(statistics.mean(map(entropy, outcomes)), 2)


def entropy(outcomes: Sequence[Any]) -> float:
    """In bits."""
    shares = [number / len(outcomes) for number in Counter(outcomes).values()]
    return -sum(share * math.log2(share) for share in shares)


def warm(subject: Subject, seed: int) -> float:
    """Seconds of a call with a caption that it has not seen."""
    caption = evaluation_captions("pair", seed + 1, 0)[seed][0]
    start = time.perf_counter()
    subject.pipe(caption, seed=seed, progress=False)
    return time.perf_counter() - start


def cold(subject: Subject, folder: Path, seed: int) -> float:
    """Seconds of the command, from its start until it has ended."""
    file = folder / f"{subject.name}-{seed}.png"
    command = [sys.executable, "-m", "zimage", "generate", "a red circle left of a blue square", "--quiet"]
    command += ["--model", subject.name, "--seed", str(seed), "--output", str(file)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def percent(share: float) -> float:
    """With one place."""
    return round(100 * share, 1)


LINES = ("#1f6feb", "#1f6feb", "#d1570c", "#d1570c")
WIDE, HIGH, EDGE = 760, 320, 48


def plot(rows: Sequence[Row]) -> str:
    """Percentages against steps, on a logarithmic axis, as an SVG picture; every second line is dashed."""

    def at(steps: float, right: float) -> str:
        across = math.log(steps / STEPS[0]) / math.log(STEPS[-1] / STEPS[0])
        return f"{EDGE + across * (WIDE - 6 * EDGE):.1f},{HIGH - EDGE - right / 100 * (HIGH - 2 * EDGE):.1f}"

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
