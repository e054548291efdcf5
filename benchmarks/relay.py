"""What a relay keeps of the base model and what it saves: the table of docs/relay.md.

Pictures are made many at a time, as `zimage.training.evaluate` does, by the two transformers along the noise levels
of a `RelayRequest`, so a picture here is the relay's of the same seed up to rounding; all handovers of a schedule
begin with the same steps of the base model, which are taken once, with the guidance of the released one. "single" and
"pair" are the percentages of held-out captions that are drawn as they say. "avoided": captions that leave the colour
open are drawn, and then again with the colour that came as the negative prompt; how often nothing has it any more,
and how often what is drawn then is as asked.
"diversity": bits of entropy, over seeds of "a ... on a white background", of colour (8), ninth of the picture (9) and
size (2) at once and of each, mean over the five shapes, of those pictures that are as asked.

    python benchmarks/relay.py [--count 80] [--seeds 30] [--steps 25] [--handovers 1,0.9,0.75,0]
    python benchmarks/relay.py --count 240 --seeds 100 --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zimage import GenerationRequest, Relay, RelayRequest, ZImagePipeline
from zimage.bench.report import write
from zimage.cli.running import evaluations
from zimage.denoiser import schedule
from zimage.models.autoencoder import to_image
from zimage.models.transformer import TOKEN_MULTIPLE
from zimage.sampling.guidance import guide
from zimage.sampling.noise import seeded_noise
from zimage.sampling.samplers import SAMPLERS, sample
from zimage.sampling.schedule import model_timesteps
from zimage.training import judge
from zimage.training.captions import evaluation_captions
from zimage.training.tokenizer import batch_of, tokens_of
from zimage.training.world import CANVASES, SHAPES, Claims, ObjectClaim
from zimage.variants import BASE

Row = dict[str, Any]
Caption = tuple[str, Claims]
Velocity = Callable[[Tensor, float], Tensor]
HANDOVERS = (1.0, 0.954, 0.9, 0.833, 0.75, 0.642, 0.0)
"""At or just below Turbo's own noise levels, so that none of its steps is a short one."""
PARTS = ("captions", "negatives", "diversity")
COLUMNS = (
    "steps", "handover", "evaluations", "single", "pair", "avoided", "as asked then", "diversity", "colour", "ninth",
    "size",
)  # fmt: skip
BATCH = 50


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=80, help="captions of each kind")
    parser.add_argument("--seeds", type=int, default=30, help="seeds of each shape, for the diversity")
    parser.add_argument("--steps", type=int, default=25, help="of the base model's whole schedule")
    parser.add_argument("--handovers", default=",".join(map(str, HANDOVERS)), help="1 is Turbo alone, 0 base alone")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure of each row")
    parser.add_argument("--output", type=Path, help="folder for the figures, as JSON")
    arguments = parser.parse_args()
    relay = Relay.from_pretrained("demo", "demo-turbo", device="cpu", dtype="float32")
    drawer = Drawer(relay, arguments.steps, [float(one) for one in arguments.handovers.split(",")])
    rows: dict[float, Row] = {
        handover: {"steps": arguments.steps, "handover": handover, "evaluations": drawer.cost(handover)}
        for handover in drawer.handovers
    }
    measures = {
        "captions": lambda: captions(drawer, arguments.count),
        "negatives": lambda: negatives(drawer, arguments.count),
        "diversity": lambda: diversity(drawer, arguments.seeds),
    }
    for part in arguments.parts.split(","):
        for handover, found in measures[part]():
            rows[handover] |= found
            print(rows[handover], flush=True)
            if arguments.output:
                keep(arguments, relay, rows[handover])
    print(f"\n{table(list(rows.values()))}")


class Drawer:
    """Pictures of the same captions from the same seeds, at several handovers."""

    def __init__(self, relay: Relay, steps: int, handovers: Sequence[float]) -> None:
        self.relay, self.handovers = relay, list(handovers)
        plain = GenerationRequest("", seed=0, num_inference_steps=steps, guidance_scale=BASE.guidance_scale)
        self.base = relay.base.resolve(plain)
        self.turbo = relay.turbo.resolve(GenerationRequest("", seed=0))
        self.guidance = self.base.guidance_scale

    def cost(self, handover: float) -> int:
        """Evaluations of a picture's transformers."""
        alone = {0.0: self.base, 1.0: self.turbo}.get(handover)
        return self.request(handover).evaluations if alone is None else evaluations(alone)

    def request(self, handover: float) -> RelayRequest:
        """A picture of the relay's."""
        return RelayRequest(self.base, self.turbo, handover)

    def levels(self, handover: float) -> tuple[list[float], list[float]]:
        """The noise levels of both parts; one model alone has all of its own, and the other none."""
        if handover in (0.0, 1.0):
            whole = schedule(self.turbo if handover else self.base).tolist()
            return ([], whole) if handover else (whole, [])
        base, turbo = self.request(handover).levels
        return base.tolist(), turbo.tolist()

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        handovers: Sequence[float],
        negatives: Sequence[str] | None = None,
    ) -> dict[float, list[judge.Reading]]:
        """What is seen in a picture of each prompt from its seed, at each of the handovers."""
        ids = tokens_of(self.relay.base.text_encoder.tokenizer, prompts)
        read: dict[float, dict[int, judge.Reading]] = {handover: {} for handover in handovers}
        for numbers in batches(ids):
            noise = torch.stack([seeded_noise(seeds[number], (16, 16, 16)) for number in numbers])
            own = [ids[number] for number in numbers]
            other = None if negatives is None else [negatives[number] for number in numbers]
            for handover, latents in self._latents(noise, own, other, handovers).items():
                for number, one in zip(numbers, latents, strict=True):
                    picture = to_image(self.relay.turbo.autoencoder.decode(one[None]))
                    read[handover][number] = judge.read(np.asarray(picture))
        return {handover: [found[number] for number in range(len(prompts))] for handover, found in read.items()}

    def _latents(
        self, noise: Tensor, ids: list[list[int]], negatives: list[str] | None, handovers: Sequence[float]
    ) -> dict[float, Tensor]:
        """The final latents at each handover; the base model's steps are taken once for all."""
        plans = {handover: self.levels(handover) for handover in handovers}
        handed = {handover: noise for handover in handovers}
        longest = max((base for base, _ in plans.values()), key=len)
        if longest:
            velocity = self._guided(ids, negatives, longest)
            latents = noise
            for sigma, following in pairwise(schedule(self.base).tolist()):
                ending = {handover: base[-1] for handover, (base, _) in plans.items() if sigma in base[-2:-1]}
                if sigma not in longest[:-1]:
                    break
                slope = velocity(latents, sigma)
                for handover, end in ending.items():
                    handed[handover] = latents + (end - sigma) * slope
                latents = latents + (following - sigma) * slope
        return {handover: self._finished(handed[handover], ids, turbo) for handover, (_, turbo) in plans.items()}

    def _finished(self, latents: Tensor, ids: list[list[int]], levels: list[float]) -> Tensor:
        """Turbo's steps, if it has any."""
        if levels:
            predicted = self._plain(self.relay.turbo, ids, levels)
            sampler = SAMPLERS[self.relay.turbo.variant.sampler]
            for step in sample(sampler, lambda noisy, sigma: -predicted(noisy, sigma), latents, levels):
                latents = step.latents
        return latents

    def _guided(self, ids: list[list[int]], negatives: list[str] | None, levels: list[float]) -> Velocity:
        """The base model's velocity with guidance."""
        base = self.relay.base
        other = tokens_of(base.text_encoder.tokenizer, negatives or [""])
        positive, negative = (self._plain(base, one, levels) for one in (ids, other))
        return lambda latents, sigma: -guide(positive(latents, sigma), negative(latents, sigma), self.guidance)

    def _plain(self, pipe: ZImagePipeline, ids: list[list[int]], levels: list[float]) -> Velocity:
        """What a transformer predicts, the negated velocity."""
        filled, lengths = batch_of(ids)
        features = pipe.text_encoder.model(input_ids=filled, use_cache=False).last_hidden_state
        transformer = pipe.transformer
        caption = transformer.encode_captions(features, lengths)
        times = model_timesteps(torch.tensor([level for level in levels if level > 0]))
        modulations = dict(zip(levels, transformer.modulations(times), strict=False))

        def predicted(latents: Tensor, sigma: float) -> Tensor:
            grid = transformer.grid(latents.shape[2], latents.shape[3], caption.length)
            return transformer.denoise(latents, caption, grid, modulations[sigma]).float()

        return predicted


def batches(ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of prompts whose tokens are filled up to the same length."""
    by_length: dict[int, list[int]] = {}
    for number, one in enumerate(ids):
        by_length.setdefault(-(-len(one) // TOKEN_MULTIPLE), []).append(number)
    for numbers in by_length.values():
        yield from (numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH))


Found = Iterator[tuple[float, Row]]


def captions(drawer: Drawer, count: int) -> Found:
    """The percentage of captions that are drawn as they say; picture k has the seed k."""
    rows: dict[float, Row] = {handover: {} for handover in drawer.handovers}
    for kind in ("single", "pair"):
        asked = evaluation_captions(kind, count, 0)
        seen = drawer.draw([text for text, _ in asked], range(count), drawer.handovers)
        for handover, readings in seen.items():
            rows[handover][kind] = percent(
                [judge.agrees(reading, claims) for reading, (_, claims) in zip(readings, asked, strict=True)]
            )
    yield from rows.items()


def negatives(drawer: Drawer, count: int) -> Found:
    """How often the colour that comes by itself stays away once it is the negative prompt. Turbo alone refuses that."""
    asked = evaluation_captions("open", count, 0)
    plain = drawer.draw([text for text, _ in asked], range(count), drawer.handovers)
    for handover, readings in plain.items():
        if handover == 1:
            continue
        found = [(seed, [one.colour for one in reading.objects if one.colour]) for seed, reading in enumerate(readings)]
        coloured = [(seed, colours[0]) for seed, colours in found if colours]
        texts, seeds = [asked[seed][0] for seed, _ in coloured], [seed for seed, _ in coloured]
        again = drawer.draw(texts, seeds, [handover], [colour for _, colour in coloured])[handover]
        avoided = [
            colour not in {one.colour for one in reading.objects}
            for reading, (_, colour) in zip(again, coloured, strict=True)
        ]
        right = [judge.agrees(reading, asked[seed][1]) for reading, seed in zip(again, seeds, strict=True)]
        yield handover, {"avoided": percent(avoided), "as asked then": percent(right)}


def diversity(drawer: Drawer, seeds: int) -> Found:
    """Bits of entropy over seeds of what captions leave open."""
    outcomes: dict[float, list[list[Any]]] = {handover: [] for handover in drawer.handovers}
    for shape in SHAPES:
        claims = Claims(objects=(ObjectClaim(shape=shape),), background="white")
        seen = drawer.draw([f"a {shape} on a white background"] * seeds, range(seeds), drawer.handovers)
        for handover, readings in seen.items():
            outcomes[handover].append([outcome(one) for one in readings if judge.agrees(one, claims)])
    for handover, of_shapes in outcomes.items():
        named = {
            name: mean_entropy([[one[place] for one in seen] for seen in of_shapes])
            for place, name in enumerate(("colour", "ninth", "size"))
        }
        yield handover, {"diversity": mean_entropy(of_shapes), **named}


def outcome(reading: judge.Reading) -> tuple[Any, ...]:
    """What the caption left open: colour, ninth of the picture and size of the object."""
    (only,) = reading.objects
    side = CANVASES[0][0] / 3
    return only.colour, (int(only.centre[0] // side), int(only.centre[1] // side)), only.size


def mean_entropy(outcomes: Sequence[Sequence[Any]]) -> float:
    """The mean of the entropies in bits."""
    return round(statistics.mean(map(entropy, outcomes)), 2)


def entropy(outcomes: Sequence[Any]) -> float:
    """In bits; of nothing it is 0."""
    shares = [number / len(outcomes) for number in Counter(outcomes).values()]
    return -sum(share * math.log2(share) for share in shares)


def percent(seen: Sequence[bool]) -> float:
    """Of those that are true, with one place."""
    return round(100 * sum(seen) / max(1, len(seen)), 1)


def keep(arguments: argparse.Namespace, relay: Relay, row: Row) -> None:
    """Put a row, or a part of one, into today's file beside what is there of the same captions and models."""
    name = f"relay-cpu-{date.today().isoformat()}"
    report: Row = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": str(relay.base.dtype),
        "models": {pipe.model["source"]: pipe.model["fingerprint"] for pipe in (relay.base, relay.turbo)},
        "samplers": {pipe.model["source"]: pipe.variant.sampler for pipe in (relay.base, relay.turbo)},
        "guidance_scale": BASE.guidance_scale,
        "captions": arguments.count,
        "seeds": arguments.seeds,
    }
    file = arguments.output / f"{name}.json"
    there = json.loads(file.read_text()) if file.exists() else {}
    same = all(there.get(key) == value for key, value in report.items())
    rows = {(one["steps"], one["handover"]): one for one in (there["rows"] if same else ())}
    place = row["steps"], row["handover"]
    rows[place] = rows.get(place, {}) | row
    write({**report, "rows": [rows[one] for one in sorted(rows, reverse=True)]}, arguments.output, name)


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown; a dash where there is nothing."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    lines += [["–" if row.get(name) is None else str(row[name]) for name in COLUMNS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
