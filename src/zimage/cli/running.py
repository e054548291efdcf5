"""A model at work for a command: what is said about it, how Ctrl-C stops it, and what is reported of a picture."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..hires import passes

if TYPE_CHECKING:
    from ..files.recipe import Recipe
    from ..pipeline import ZImagePipeline
    from ..request import ResolvedRequest

_SEEDS_SHOWN = 4


@contextmanager
def cancel_on_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second raises `KeyboardInterrupt`. An ignored SIGINT stays ignored."""
    event = threading.Event()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        os.write(2, b"\nzimage: stopping after this step; Ctrl-C again stops at once\n")

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        yield event
        return
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def shows_progress(quiet: bool) -> bool:
    """Whether a progress bar has anyone to look at it."""
    return not quiet and sys.stderr is not None and sys.stderr.isatty()


def announce(pipe: ZImagePipeline, requests: Sequence[ResolvedRequest]) -> None:
    """Say on stderr, in one line, what is about to be drawn and with what."""
    first = requests[0]
    seeds = ", ".join(str(request.seed) for request in requests[:_SEEDS_SHOWN])
    more = ", ..." if len(requests) > _SEEDS_SHOWN else ""
    parts = [
        pipe.variant.name,
        f"{first.steps} steps" + ("" if first.sampler == "euler" else f" of {first.sampler}"),
        *([f"{len(first.cache)} of them evaluated"] if first.cache else []),
        *([f"from an image at strength {first.strength:g}"] if first.image is not None else []),
        *([f"steered at {first.controlnet_conditioning_scale:g}"] if first.control_image is not None else []),
        f"guidance {first.guidance_scale:g}",
        *(f"{name} at {value:g}" for name, value in first.adapters),
        *([f"diversity {first.diversity:g}"] if first.diversity else []),
        f"{first.width}x{first.height}",
        *([f"{first.hires.scale:g} times as large at strength {first.hires.strength:g}"] if first.hires else []),
        f"seed {seeds}" if len(requests) == 1 else f"{len(requests)} pictures, seeds {seeds}{more}",
        f"{str(pipe.dtype).removeprefix('torch.')} on {pipe.device}",
    ]
    if pipe.plan is not None and pipe.plan.rejected:
        parts.append(str(pipe.plan.placement))
    print(f"zimage: {', '.join(parts)}", file=sys.stderr, flush=True)


def tell(sentences: Iterable[str]) -> None:
    """Say on stderr what happened, a line each."""
    for sentence in sentences:
        print(f"zimage: {sentence}", file=sys.stderr, flush=True)


def evaluations(request: ResolvedRequest) -> int:
    """Transformer evaluations of one picture, counted by driving its sampler with a stand-in for the model."""
    return sum(map(_evaluations, passes(request)))


def _evaluations(request: ResolvedRequest) -> int:
    from ..sampling.guidance import is_guided
    from ..sampling.samplers import SAMPLERS, count_evaluations
    from ..sampling.schedule import model_timesteps, shifted_sigmas

    levels = shifted_sigmas(
        request.num_inference_steps, request.shift, request.sigmas, request.strength, request.keep_steps
    )
    sigmas = levels.tolist()
    times = dict(zip(sigmas, model_timesteps(levels).tolist(), strict=True))

    def branches(sigma: float) -> int:
        return 2 if is_guided(times[sigma], request.guidance_scale, request.cfg_truncation) else 1

    return count_evaluations(SAMPLERS[request.sampler], sigmas, branches, request.cache)


def print_json(recipe: Recipe, *, seconds: float, **more: Any) -> None:
    """Print one JSON object about a picture on one line."""
    known = json.loads(recipe.to_json())
    report = {
        **more,
        **{part: known[part] for part in ("request", "model", "runtime", "pixels")},
        "seconds": round(seconds, 3),
        "evaluations": evaluations(recipe.request),
    }
    print(json.dumps(report), flush=True)
