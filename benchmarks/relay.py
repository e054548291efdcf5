"""What a relay keeps of the base model and what it saves: the table of docs/relay.md.

Every setting draws the same captions from the same seeds, in turn, through `zimage.Relay`. "single" and "pair" are the
percentages of held-out captions that are drawn as they say. "avoided": captions that leave the colour open are drawn,
and then again with the colour that came as the negative prompt; how often nothing has it any more, and how often what
is drawn then is as asked. "diversity": bits of entropy, over seeds of "a ... on a white background", of colour (8),
ninth of the picture (9) and size (2) at once and of each, mean over the five shapes, of those pictures that are as
asked.

    python benchmarks/relay.py [--count 80] [--seeds 40] [--rows "turbo;handover 0.75, 25 steps"]
    python benchmarks/relay.py --count 240 --seeds 100 --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from zimage import Relay
from zimage.bench.report import write
from zimage.cli.running import evaluations
from zimage.legs import RelayRequest
from zimage.training import judge
from zimage.training.captions import evaluation_captions
from zimage.training.world import CANVASES, SHAPES, Claims, ObjectClaim

Row = dict[str, Any]
Caption = tuple[str, Claims]
SETTINGS: dict[str, Row] = {
    **{f"base, {steps} steps": {"handover": 0, "num_inference_steps": steps} for steps in (50, 25, 12)},
    "turbo": {"handover": 1},
    **{
        f"handover {handover:g}, {steps} steps": {"handover": handover, "num_inference_steps": steps}
        for steps, handovers in {25: (0.95, 0.9, 0.8, 0.75, 0.65), 16: (0.75,), 12: (0.75,)}.items()
        for handover in handovers
    },
}
"""What each row is drawn with; `num_inference_steps` is the base model's whole schedule."""

PARTS = ("captions", "negatives", "diversity")
COLUMNS = (
    "row", "evaluations", "single", "pair", "avoided", "as asked then", "diversity", "colour", "ninth", "size"
)  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=80, help="captions of each kind")
    parser.add_argument("--seeds", type=int, default=40, help="seeds of each shape, for the diversity")
    parser.add_argument("--rows", default=";".join(SETTINGS), help="names of rows, with semicolons between")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure of each row")
    parser.add_argument("--output", type=Path, help="folder for the figures, as JSON")
    arguments = parser.parse_args()
    names = arguments.rows.split(";")
    if unknown := set(names) - set(SETTINGS):
        parser.error(f"there are no rows {'; '.join(sorted(unknown))}; choose from {'; '.join(SETTINGS)}")
    relay = Relay.from_pretrained("demo", "demo-turbo", device="cpu")
    rows = []
    for name in names:
        measured = measure(relay, SETTINGS[name], arguments.parts.split(","), arguments.count, arguments.seeds)
        rows.append({"row": name, **measured})
        print(rows[-1], flush=True)
        if arguments.output:
            keep(arguments, relay, rows[-1])
    print(f"\n{table(rows)}")


def keep(arguments: argparse.Namespace, relay: Relay, row: Row) -> None:
    """Put a row, or a part of one, into today's file beside what is there of the same captions and models."""
    name = f"relay-cpu-{date.today().isoformat()}"
    report: Row = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": str(relay.base.dtype),
        "models": {pipe.model["source"]: pipe.model["fingerprint"] for pipe in (relay.base, relay.turbo)},
        "captions": arguments.count,
        "seeds": arguments.seeds,
    }
    file = arguments.output / f"{name}.json"
    there = json.loads(file.read_text()) if file.exists() else {}
    same = all(there.get(key) == value for key, value in report.items())
    rows = {one["row"]: one for one in (there["rows"] if same else ())}
    rows[row["row"]] = rows.get(row["row"], {}) | row
    write({**report, "rows": [rows[name] for name in SETTINGS if name in rows]}, arguments.output, name)


def measure(relay: Relay, setting: Row, parts: Sequence[str], count: int, seeds: int) -> Row:
    """One row: what a picture costs, and what the pictures are."""
    output = relay("a star", seed=0, progress=False, **setting)
    row: Row = {"evaluations": cost(output.requests[0])}  # type: ignore[union-attr]
    if "captions" in parts:
        row |= {kind: adherence(relay, setting, evaluation_captions(kind, count, 0)) for kind in ("single", "pair")}
    if "negatives" in parts:
        row |= negatives(relay, setting, evaluation_captions("open", count, 0))
    if "diversity" in parts:
        row |= diversity(relay, setting, seeds)
    return row


def cost(request: Any) -> int:
    """Evaluations of a picture's transformers."""
    return request.evaluations if isinstance(request, RelayRequest) else evaluations(request)


def read(relay: Relay, text: str, seed: int, setting: Row) -> judge.Reading:
    """What is seen in a picture."""
    output = relay(text, seed=seed, progress=False, embed_recipe=False, **setting)
    return judge.read(output[0][0])


def adherence(relay: Relay, setting: Row, captions: Sequence[Caption]) -> float:
    """The percentage of captions that are drawn as they say; picture k has the seed k."""
    return percent(
        [judge.agrees(read(relay, text, seed, setting), claims) for seed, (text, claims) in enumerate(captions)]
    )


def negatives(relay: Relay, setting: Row, captions: Sequence[Caption]) -> Row:
    """How often the colour that comes by itself stays away once it is the negative prompt. Turbo alone refuses that."""
    if setting["handover"] == 1:
        return {"avoided": None, "as asked then": None}
    avoided, right = [], []
    for seed, (text, claims) in enumerate(captions):
        colours = [one.colour for one in read(relay, text, seed, setting).objects if one.colour]
        if not colours:
            continue
        again = read(relay, text, seed, {**setting, "negative_prompt": colours[0]})
        avoided.append(colours[0] not in {one.colour for one in again.objects})
        right.append(judge.agrees(again, claims))
    return {"avoided": percent(avoided), "as asked then": percent(right)}


def diversity(relay: Relay, setting: Row, seeds: int) -> Row:
    """Bits of entropy over seeds of what captions leave open."""
    outcomes = []
    for shape in SHAPES:
        claims = Claims(objects=(ObjectClaim(shape=shape),), background="white")
        readings = [read(relay, f"a {shape} on a white background", seed, setting) for seed in range(seeds)]
        outcomes.append([outcome(reading) for reading in readings if judge.agrees(reading, claims)])
    named = {
        name: mean_entropy([[one[place] for one in seen] for seen in outcomes])
        for place, name in enumerate(("colour", "ninth", "size"))
    }
    return {"diversity": mean_entropy(outcomes), **named}


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


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown; a dash where there is nothing."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    lines += [["–" if row.get(name) is None else str(row[name]) for name in COLUMNS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
