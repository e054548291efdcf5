"""What predicting steps of the base model costs and saves, and what else could be done in its place: docs/caching.md.

Every setting draws the same captions from the same seeds, in turn. Closeness is that of the final latents to those of
the recipe with every step evaluated, relative root mean square; what the demo draws is read by the judge. Checkpoints
other than the demo have random weights, so only closeness is said of them. With `--methods` the steps that
`cache="balanced"` does not evaluate are made in the ways of `METHODS`, which the library has but one of; what those
cost is counted in blocks, since they are no more than written out here.

    python benchmarks/caching.py [--models demo,tiny] [--count 60] [--methods] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage import GenerationRequest, ZImagePipeline, denoiser
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
TWO_OF_THREE = [index for index in range(STEPS) if index < 4 or index % 3 != 2]
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
GUIDED: Row = {"guidance_scale": BASE.guidance_scale}
"""The released base model's, also for a demo whose own is another."""
RANDOM: Row = {**GUIDED, "height": 256, "width": 256}
SENTENCES = ("a red fox in the snow", "an old house by the sea at night", "a bowl of fruit on a table", "two friends")


Velocity = Callable[[Tensor, float], Tensor]


@dataclass
class Way:
    """A picture's flow, evaluated at some of its noise levels; a method says what stands for it at the others.

    `own` is the guided flow and `positive` that of the prompt alone.
    """

    own: Velocity
    positive: Velocity
    transformer: Any
    sigmas: Sequence[float]
    evaluated: frozenset[float]
    known: list[tuple[float, Tensor]] = field(default_factory=list)
    """Noise level and result of the evaluations until now."""

    def line(self, latents: Tensor, sigma: float) -> Tensor:
        """On the line through the last two results: the library's."""
        (earlier, before), (later, last) = self.known[-2:]
        return last + (sigma - later) / (later - earlier) * (last - before)


def last(way: Way, latents: Tensor, sigma: float) -> Tensor:
    """The last result once more."""
    return way.known[-1][1]


def parabola(way: Way, latents: Tensor, sigma: float) -> Tensor:
    """On the parabola through the last three results: the second order of arXiv 2503.06923's forecasts."""
    if len(way.known) < 3:
        return way.line(latents, sigma)
    total = torch.zeros_like(latents)
    for at, result in way.known[-3:]:
        others = [other for other, _ in way.known[-3:] if other != at]
        weight = 1.0
        for other in others:
            weight *= (sigma - other) / (at - other)
        total = total + weight * result
    return total


def average(way: Way, latents: Tensor, sigma: float) -> Tensor:
    """One velocity from the last evaluation to the next, where the line has its middle: an average velocity whose
    change is taken from the evaluations before, as in arXiv 2601.19961."""
    after = [other for other in way.sigmas if other < way.known[-1][0] and (other in way.evaluated or other == 0)]
    return way.line(latents, (way.known[-1][0] + max(after)) / 2)


def guidance(way: Way, latents: Tensor, sigma: float) -> Tensor:
    """The prompt's own flow, evaluated, and what guidance adds to it on the line through the last two evaluations."""
    return way.positive(latents, sigma) + way.line(latents, sigma)


def first_block(way: Way, latents: Tensor, sigma: float) -> Tensor:
    """Refiners and the first layer, evaluated, and what the other layers added when they last were."""
    way.transformer._run.reuses = True
    try:
        return way.own(latents, sigma)
    finally:
        way.transformer._run.reuses = False


METHODS: dict[str, tuple[Callable[[Way, Tensor, float], Tensor], Sequence[int]]] = {
    "the line through two results": (Way.line, ()),
    "the last result": (last, ()),
    "the parabola through three": (parabola, ()),
    "an average velocity": (average, ()),
    "guidance on the line": (guidance, ()),
    "the first block": (first_block, ()),
    "the line, two steps of three": (Way.line, TWO_OF_THREE),
}
"""What stands for an evaluation, and the steps that are evaluated, by default those of `cache="balanced"`."""


class FirstBlock:
    """`ZImageTransformer._run` of both branches together, which remembers what all layers but the first add."""

    def __init__(self, transformer: Any) -> None:
        self.transformer, self.reuses, self.rest = transformer, False, []

    def __call__(self, blocks: Any, tokens: list[Tensor], rotations: Any, modulations: Any, hint: Any = None) -> Any:
        own = type(self.transformer)._run
        if blocks is not self.transformer.layers:
            return own(self.transformer, blocks, tokens, rotations, modulations, hint)
        if len(tokens) != 2:
            raise SystemExit("the first block is measured where both branches are computed together")
        first = own(self.transformer, blocks[:1], tokens, rotations, modulations[:1])
        if not self.reuses:
            done = own(self.transformer, blocks[1:], [*first], rotations, modulations[1:])
            self.rest = [after - before for after, before in zip(done, first, strict=True)]
        return [before + rest for before, rest in zip(first, self.rest, strict=True)]


@contextmanager
def made_by(method: Callable[[Way, Tensor, float], Tensor], steps: Sequence[int]) -> Iterator[None]:
    """Within it pictures with guidance evaluate their flow in `steps` only, and what `method` says in the others."""
    make, patched = denoiser.make_velocity, []

    def made(preparation: Any, request: Any, conditioning: Any, *others: Any) -> Velocity:
        sigmas = denoiser.schedule(request).tolist()
        transformer = preparation.transformer
        if method is first_block:
            transformer._run = FirstBlock(transformer)
            patched.append(transformer)
        way = Way(
            own=make(preparation, request, conditioning, *others),
            positive=make(preparation, request, replace(conditioning, negative=None), *others),
            transformer=transformer,
            sigmas=sigmas,
            evaluated=frozenset(sigmas[step] for step in steps),
        )

        def velocity(latents: Tensor, sigma: float) -> Tensor:
            if sigma not in way.evaluated:
                return method(way, latents, sigma)
            result = way.own(latents, sigma)
            added = result - way.positive(latents, sigma) if method is guidance else result
            way.known.append((sigma, added))
            return result

        return velocity

    denoiser.make_velocity = made
    try:
        yield
    finally:
        denoiser.make_velocity = make
        for transformer in patched:
            transformer.__dict__.pop("_run", None)


def cost(transformer: Any, method: Any, steps: Sequence[int]) -> float:
    """Evaluations of all steps together, one for each branch of guidance; of parts by their blocks."""
    refiners, layers = len(transformer.noise_refiner), len(transformer.layers)
    parts = {guidance: 1.0, first_block: 2 * (refiners + 1) / (refiners + layers)}
    return 2 * len(steps) + (STEPS - len(steps)) * parts.get(method, 0.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,tiny")
    parser.add_argument("--count", type=int, default=60, help="captions of each kind for the demo")
    parser.add_argument("--methods", action="store_true", help="other ways to do without an evaluation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report: Row = {
        "date": date.today().isoformat(),
        "dtype": arguments.dtype,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models.split(","):
            report[model] = rows = measure(model, Path(scratch), arguments)
            print(f"\n{model}\n")
            for row in rows:
                print("  ".join(f"{name} {value}" for name, value in row.items()))
    if arguments.output:
        name = f"caching{'-methods' if arguments.methods else ''}-{arguments.device}-{report['date']}"
        print(f"wrote {write(report, arguments.output, name)}")


def measure(model: str, scratch: Path, arguments: argparse.Namespace) -> list[Row]:
    """One row for each setting, or for each of `METHODS` and the recipe that they are compared with."""
    if model in DEMOS:
        source, count = model, arguments.count
        captions = [caption for kind in ("single", "pair") for caption in evaluation_captions(kind, count, 0)]
        options = GUIDED
    else:
        source = build_checkpoint(scratch / model, size=model, variant="base")
        captions, options = [(sentence, None) for sentence in SENTENCES], RANDOM
    pipe = ZImagePipeline.from_pretrained(source, device=arguments.device, dtype=arguments.dtype)
    ways: dict[str, Any] = {name: None for name in SETTINGS}
    if arguments.methods:
        balanced = pipe.resolve(GenerationRequest("a", **options, cache=CACHES[0])).cache
        methods = {name: (method, steps or balanced) for name, (method, steps) in METHODS.items()}
        ways = {next(iter(SETTINGS)): None, **methods}
    outcomes: dict[str, list[Row]] = {name: [] for name in ways}
    draw(pipe, 0, captions[0][0], {**options, "num_inference_steps": 2})
    for seed, (text, claims) in enumerate(captions):
        for name, way in ways.items():
            with nullcontext() if way is None else made_by(*way):
                outcome = draw(pipe, seed, text, {**options, **SETTINGS.get(name, {})})
            if claims is not None:
                outcome["right"] = judge.agrees(judge.read(outcome.pop("image")), claims)
            outcomes[name].append(outcome)
    rows = [
        summary(name, pipe, {**options, **SETTINGS.get(name, {})}, done, next(iter(outcomes.values())))
        for name, done in outcomes.items()
    ]
    for row in rows if arguments.methods else ():
        del row["speed"]
        row["evaluations"] = round(cost(pipe.transformer, *(ways[row["setting"]] or (None, range(STEPS)))), 1)
    return rows


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
