"""What predicting steps of the base model costs and saves: the table of docs/caching.md.

Every setting draws the same captions from the same seeds, in turn. Closeness is that of the final latents to those of
the recipe with every step evaluated, relative root mean square; what the demo draws is read by the judge. Checkpoints
other than the demo have random weights, so only closeness is said of them.

    python benchmarks/caching.py [--models demo,tiny] [--count 60] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from zimage import GenerationRequest, ZImagePipeline
from zimage.bench.report import write
from zimage.caching import CACHES
from zimage.cli.running import evaluations
from zimage.testing import build_checkpoint
from zimage.training import judge
from zimage.training.captions import evaluation_captions
from zimage.variants import BASE, DEMOS

Row = dict[str, Any]
STEPS = 50
SECOND = sorted({*range(4), *range(5, STEPS, 2)})
THIRD = sorted({*range(4), *range(6, STEPS, 3), STEPS - 1})
SETTINGS: dict[str, Row] = {
    "every step": {},
    "cache=balanced": {"cache": CACHES[0]},
    "every second step": {"cache": SECOND},
    "every third step": {"cache": THIRD},
    "25 steps": {"num_inference_steps": 25},
    "23 steps": {"num_inference_steps": 23},
    "25 steps of dpmpp_2m": {"num_inference_steps": 25, "sampler": "dpmpp_2m"},
    "dpmpp_2m, cache=balanced": {"sampler": "dpmpp_2m", "cache": CACHES[0]},
}
"""What each differs in from the base model's recipe; the first is what the others are compared with."""
RANDOM = {"height": 256, "width": 256}
SENTENCES = ("a red fox in the snow", "an old house by the sea at night", "a bowl of fruit on a table", "two friends")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,tiny")
    parser.add_argument("--count", type=int, default=60, help="captions of each kind for the demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report: Row = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models.split(","):
            report[model] = rows = measure(model, arguments.count, Path(scratch), arguments.device)
            print(f"\n{model}\n")
            for row in rows:
                print("  ".join(f"{name} {value}" for name, value in row.items()))
    if arguments.output:
        name = f"caching-{arguments.device}-{report['date']}"
        print(f"wrote {write(report, arguments.output, name)}")


def measure(model: str, count: int, scratch: Path, device: str) -> list[Row]:
    """One row for each setting."""
    if model in DEMOS:
        pipe = ZImagePipeline.from_pretrained(model, device=device)
        captions = [caption for kind in ("single", "pair") for caption in evaluation_captions(kind, count, 0)]
        options: Row = {"guidance_scale": BASE.guidance_scale}  # whatever the demo names of its own
    else:
        pipe = ZImagePipeline.from_pretrained(
            build_checkpoint(scratch / model, size=model, variant="base"), device=device
        )
        captions, options = [(sentence, None) for sentence in SENTENCES], RANDOM
    outcomes: dict[str, list[Row]] = {name: [] for name in SETTINGS}
    draw(pipe, 0, captions[0][0], {**options, "num_inference_steps": 2})
    for seed, (text, claims) in enumerate(captions):
        for name, setting in SETTINGS.items():
            outcome = draw(pipe, seed, text, {**options, **setting})
            if claims is not None:
                outcome["right"] = judge.agrees(judge.read(outcome.pop("image")), claims)
            outcomes[name].append(outcome)
    return [
        summary(name, pipe, {**options, **SETTINGS[name]}, done, next(iter(outcomes.values())))
        for name, done in outcomes.items()
    ]


def draw(pipe: ZImagePipeline, seed: int, text: str, options: Row) -> Row:
    """A picture, its latents, and the time that its steps and its decoding took."""
    start = time.perf_counter()
    *_, last = pipe.stream(GenerationRequest(text, seed=seed, **options), embed_recipe=False)
    return {"seconds": time.perf_counter() - start, "latents": last.latents.float().cpu(), "image": last.image}


def summary(name: str, pipe: ZImagePipeline, options: Row, outcomes: Sequence[Row], exact: Sequence[Row]) -> Row:
    """A setting beside the first one."""
    distances = [distance(one["latents"], other["latents"]) for one, other in zip(outcomes, exact, strict=True)]
    row: Row = {
        "setting": name,
        "evaluations": evaluations(pipe.resolve(GenerationRequest("a", **options))),
        "speed": round(median(exact) / median(outcomes), 2),
        "distance": round(statistics.mean(distances), 4),
        "median": round(statistics.median(distances), 4),
    }
    if "right" in outcomes[0]:
        half = len(outcomes) // 2
        for kind, part in (("single", outcomes[:half]), ("pair", outcomes[half:])):
            row[kind] = round(100 * statistics.mean(one["right"] for one in part), 1)
    return row


def median(outcomes: Sequence[Row]) -> float:
    """Seconds."""
    return statistics.median(one["seconds"] for one in outcomes)


def distance(latents: torch.Tensor, exact: torch.Tensor) -> float:
    """Of two latents, relative to the norm of the second."""
    return float((latents - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
