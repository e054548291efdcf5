"""The released sizes on a card, all cases in one process on one set of random weights: the table of docs/speed.md.

A case is a measurement of `zimage.bench`: both sides in turn, equal work and results or an error. Weights are made once
(20 GB on the card). Diffusers' blocks stay compiled once they are, so what compiles comes last, whatever order is asked
for. `--output` keeps the result of each case as soon as it is there, so that a run that is cut short loses nothing, and
only of ten rounds or more. In `recipe` a picture of the base model's whole recipe is drawn by diffusers, by zimage and
by zimage with `cache="balanced"`, in turn, from prompts that are new in each round.

    python benchmarks/card.py [--cases 1024,512,256] [--rounds 10] [--device cuda] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import ZImagePipeline as Diffusers

from zimage import ZImagePipeline
from zimage.bench.machine import describe
from zimage.bench.measure import prepare, run, take_turns
from zimage.bench.report import save, text, write
from zimage.bench.settings import KEPT_ROUNDS, Settings
from zimage.bench.sides import Side, ZImage
from zimage.caching import CACHES
from zimage.testing import build_diffusers
from zimage.testing.configs import DIFFUSERS_VERSION, scheduler_config
from zimage.variants import get_variant

DRAWN: dict[str, Any] = {"stages": ("denoise", "end-to-end")}
CASES: dict[str, dict[str, Any]] = {
    "1024": {},
    "512": {"height": 512, "width": 512},
    "256": {"height": 256, "width": 256},
    "float16": {"dtype": "float16", **DRAWN},
    "base": {"variant": "base", "steps": 4, **DRAWN},
    "base-512": {"variant": "base", "steps": 4, "height": 512, "width": 512, **DRAWN},
    "base-256": {"variant": "base", "steps": 4, "height": 256, "width": 256, **DRAWN},
    "base-256-graphs": {"variant": "base", "steps": 4, "height": 256, "width": 256, "cuda_graphs": True, **DRAWN},
    "int8": {"weight_dtype": "int8", "quantize_activations": True, **DRAWN},
    "float8": {"weight_dtype": "float8", "quantize_activations": True, **DRAWN},
    "float8-attention": {"weight_dtype": "float8", "quantize_activations": True, "attention": "float8", **DRAWN},
    "attention": {"attention": "float8", **DRAWN},
    "1024-compiled": {"compile": True, **DRAWN},
    "float8-compiled": {"compile": True, "weight_dtype": "float8", "quantize_activations": True, **DRAWN},
    "1024-graphs": {"cuda_graphs": True},
    "float8-graphs": {"cuda_graphs": True, "weight_dtype": "float8", "quantize_activations": True},
    "float8-attention-graphs": {
        "cuda_graphs": True,
        "weight_dtype": "float8",
        "quantize_activations": True,
        "attention": "float8",
    },
    "256-graphs": {"cuda_graphs": True, "height": 256, "width": 256},
    "512-graphs": {"cuda_graphs": True, "height": 512, "width": 512},
    "256-graphs-compiled": {"compile": True, "cuda_graphs": True, "height": 256, "width": 256, **DRAWN},
}
"""What each has for `Settings`; "float16" makes its own weights."""
RECIPE = "recipe"


def main() -> None:
    """Measure the chosen cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join([*CASES, RECIPE]), help="each with :rounds where it has its own")
    parser.add_argument("--size", default="real")
    parser.add_argument("--rounds", type=int, default=KEPT_ROUNDS)
    parser.add_argument("--recipe-side", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help=f"folder to keep results in, of {KEPT_ROUNDS} rounds or more")
    arguments = parser.parse_args()
    pairs = [one.partition(":") for one in arguments.cases.split(",")]
    cases = sorted(((name, int(own or arguments.rounds)) for name, _, own in pairs), key=lambda case: compiles(case[0]))
    unknown = {name for name, _ in cases} - {*CASES, RECIPE}
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join([*CASES, RECIPE])}")
    few = [name for name, rounds in cases if rounds < KEPT_ROUNDS]
    if arguments.output and few:
        names = ", ".join(few)
        parser.error(f"--output needs {KEPT_ROUNDS} rounds or more of {names}; take so many, or leave it out")
    warnings.filterwarnings("ignore", module=r"(?!zimage)")
    began = time.perf_counter()
    built = build_diffusers(size=arguments.size, device=arguments.device)
    print(f"weights after {time.perf_counter() - began:.0f} s", flush=True)
    failed = []
    for name, rounds in cases:
        began = time.perf_counter()
        try:
            print(f"\n== {name}\n{measure(name, rounds, built, arguments)}", flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def compiles(name: str) -> bool:
    """Whether a case leaves diffusers' blocks compiled."""
    return CASES.get(name, {}).get("compile", False)


def measure(name: str, rounds: int, built: Any, arguments: argparse.Namespace) -> str:
    """A case, kept if that is asked for, as text."""
    if name == RECIPE:
        result = recipe(of_variant(built, "base"), arguments.size, rounds, arguments.recipe_side)
        if arguments.output:
            write(result, arguments.output, f"recipe-{arguments.size}-{time.strftime('%Y-%m-%d')}")
        return "\n".join(f"{key}: {value}" for key, value in result.items())
    settings = Settings(size=arguments.size, device=arguments.device, rounds=rounds, **CASES[name])
    other = settings.dtype != "auto"
    report = run(settings, built=None if other else of_variant(built, settings.variant or "turbo"))
    if arguments.output:
        save(report, arguments.output)
    return text(report)


def of_variant(pipe: Any, variant: Any) -> Any:
    """Diffusers' pipeline over the modules of `pipe` with the schedule of `variant`."""
    schedule = scheduler_config(DIFFUSERS_VERSION[variant], get_variant(variant).shift)
    parts = {**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler.from_config(schedule)}
    return Diffusers(**parts)


def recipe(theirs: Any, size: str, rounds: int, side: int) -> dict[str, Any]:
    """Seconds of a picture at the base model's recipe; both exact sides are held to the same work and results, and all
    read their prompts themselves."""
    theirs.set_progress_bar_config(disable=True)
    pipe = ZImagePipeline.from_diffusers(theirs, variant="base")
    steps = pipe.variant.num_inference_steps
    settings = Settings(size=size, variant="base", height=side, width=side, steps=steps, rounds=rounds)
    bench = prepare(settings, pipe, theirs)
    bench = replace(bench, sides={**bench.sides, "balanced": ZImage(pipe, bench.request, {"cache": CACHES[0]})})

    def draw(number: int) -> Callable[[Side], Any]:
        texts = bench.texts(number)

        def act(side: Side) -> Any:
            pipe.text_encoder.forget()
            return side.draw(texts, number)

        return act

    runs, cosine = take_turns(bench, "end-to-end", draw)
    medians = {name: statistics.median(run.times) for name, run in runs.items()}
    return {
        "steps": steps,
        "guidance_scale": bench.request.guidance_scale,
        "side": side,
        "rounds": rounds,
        "times_s": {name: run.times for name, run in runs.items()},
        "work": {name: run.work[0] for name, run in runs.items()},
        "cosine": cosine,
        "ratio": medians["diffusers"] / medians["zimage"],
        "balanced_ratio": medians["diffusers"] / medians["balanced"],
        "machine": describe(pipe.device),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


if __name__ == "__main__":
    main()
