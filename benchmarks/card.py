"""The released sizes on a card, all cases in one process on one set of random weights: the table of docs/speed.md.

A case is a measurement of `zimage.bench`: both sides in turn, equal work and results or an error. Weights are made once
(20 GB on the card). Diffusers' blocks stay compiled once they are, so what compiles comes last, whatever order is asked
for. `--output` keeps the result of each case as soon as it is there, so that a run that is cut short loses nothing. In
`recipe` a picture of the base model's whole recipe is drawn by diffusers, by zimage and by zimage with
`cache="balanced"`, in turn.

    python benchmarks/card.py [--cases 1024,512,256] [--rounds 10] [--device cuda] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import ZImagePipeline as Diffusers

from zimage import ZImagePipeline
from zimage.bench.machine import describe
from zimage.bench.measure import run
from zimage.bench.report import save, text, write
from zimage.bench.settings import Settings
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
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--recipe-rounds", type=int, default=2)
    parser.add_argument("--recipe-side", type=int, default=1024)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    names = sorted(arguments.cases.split(","), key=compiles)
    unknown = {name.partition(":")[0] for name in names} - {*CASES, RECIPE}
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join([*CASES, RECIPE])}")
    warnings.filterwarnings("ignore", module=r"(?!zimage)")
    began = time.perf_counter()
    built = build_diffusers(size=arguments.size, device=arguments.device)
    print(f"weights after {time.perf_counter() - began:.0f} s", flush=True)
    failed = []
    for name in names:
        began = time.perf_counter()
        try:
            print(f"\n== {name}\n{measure(name, built, arguments)}", flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def compiles(name: str) -> bool:
    """Whether a case leaves diffusers' blocks compiled."""
    return CASES.get(name.partition(":")[0], {}).get("compile", False)


def measure(name: str, built: Any, arguments: argparse.Namespace) -> str:
    """A case, kept if that is asked for, as text."""
    name, _, own = name.partition(":")
    if name == RECIPE:
        result = recipe(of_variant(built, "base"), arguments.recipe_rounds, arguments.recipe_side)
        if arguments.output:
            write(result, arguments.output, f"recipe-{arguments.size}-{time.strftime('%Y-%m-%d')}")
        return "\n".join(f"{key}: {value}" for key, value in result.items())
    rounds = int(own or arguments.rounds)
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


def recipe(theirs: Any, rounds: int, side: int) -> dict[str, Any]:
    """Seconds of a picture at the base model's recipe, after a picture of few steps that warms up."""
    theirs.set_progress_bar_config(disable=True)
    pipe = ZImagePipeline.from_diffusers(theirs, variant="base")
    options: dict[str, Any] = {"negative_prompt": "blurry"}
    guidance, steps = pipe.variant.guidance_scale, pipe.variant.num_inference_steps

    def draw(**more: Any) -> Callable[[int], Any]:
        return lambda count: pipe(
            "a red fox in the snow",
            height=side,
            width=side,
            num_inference_steps=count,
            seed=1,
            progress=False,
            **options,
            **more,
        )

    sides: dict[str, Callable[[int], Any]] = {
        "diffusers": lambda count: theirs(
            "a red fox in the snow", height=side, width=side, num_inference_steps=count, guidance_scale=guidance,
            generator=torch.Generator().manual_seed(1), **options,
        ),
        "zimage": draw(),
        "balanced": draw(cache=CACHES[0]),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + 1):
        for name, act in sides.items():
            began = time.perf_counter()
            act(steps if index else 6)  # each ends with a picture on the host
            if index:
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "steps": steps,
        "guidance_scale": guidance,
        "side": side,
        "times_s": times,
        "ratio": medians["diffusers"] / medians["zimage"],
        "balanced_ratio": medians["diffusers"] / medians["balanced"],
        "machine": describe(pipe.device),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


if __name__ == "__main__":
    main()
