"""zimage beside diffusers in the cases that have a goal: `zimage bench`, one stage each, as ratios of medians.

A case is a measurement of `zimage.bench` (both sides in turn in one process on the same weights, equal work and results
or an error). Without `fp32` in its name it runs in what `dtype="auto"` takes on the device. Prints a line for each case
and, with --output, keeps them all as JSON with machine and versions.

    python benchmarks/against_diffusers.py [--cases tiny,text,wide] [--rounds 15] [--device cpu] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from zimage.bench.measure import run
from zimage.bench.report import Report, write
from zimage.bench.settings import Settings


@dataclass(frozen=True)
class Case:
    """One measurement of one stage; `goal` is the ratio diffusers / zimage that it should reach."""

    settings: Settings
    goal: float

    @property
    def stage(self) -> str:
        return self.settings.stages[0]


def case(size: str, goal: float, *, dtype: str = "auto", variant: str = "turbo", stage: str = "end-to-end") -> Case:
    """A case of random weights; a picture's prompt has 8 words, a prompt that is encoded alone has 20."""
    words = 20 if stage == "encode" else 8
    settings = Settings(size=size, dtype=dtype, variant=variant, stages=(stage,), words=words)
    return Case(settings, goal)


CASES = {
    "tiny": case("tiny", 1.8),
    "tiny-fp32": case("tiny", 1.8, dtype="float32"),
    "tiny-cfg": case("tiny", 1.0, variant="base"),
    "tiny-cfg-fp32": case("tiny", 1.0, dtype="float32", variant="base"),
    "text": case("small", 4.0, stage="encode"),
    "text-fp32": case("small", 4.0, dtype="float32", stage="encode"),
    "small": case("small", 1.0),
    "small-fp32": case("small", 1.0, dtype="float32"),
    "small-cfg": case("small", 1.15, variant="base"),
    "small-cfg-fp32": case("small", 1.15, dtype="float32", variant="base"),
    "wide": case("wide", 1.0),
    "wide-cfg": case("wide", 1.0, variant="base"),
}


def main() -> None:
    """Run the chosen cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    unknown = set(arguments.cases.split(",")) - set(CASES)
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    warnings.filterwarnings("ignore")
    reports = {}
    for name in arguments.cases.split(","):
        chosen = CASES[name]
        reports[name] = run(replace(chosen.settings, rounds=arguments.rounds, device=arguments.device))
        print(row(name, chosen, reports[name]), flush=True)
    if arguments.output:
        rows = [{"case": name, "goal": CASES[name].goal, **report.to_dict()} for name, report in reports.items()]
        file = f"against-diffusers-{arguments.device.partition(':')[0]}-{rows[0]['date']}"
        print(f"wrote {write({'results': rows}, arguments.output, file)}")


def row(name: str, chosen: Case, report: Report) -> str:
    """A line of the table."""
    stage = report.stage(chosen.stage)
    theirs, ratio = stage.diffusers, stage.ratio
    assert theirs is not None
    assert ratio is not None
    missed = "" if ratio >= chosen.goal else ", missed"
    return (
        f"{name:14} {report.model['dtype']:8}  zimage {stage.zimage.median_s * 1e3:9.2f} ms  "
        f"diffusers {theirs.median_s * 1e3:9.2f} ms  ratio {ratio:5.2f} (goal {chosen.goal:g}{missed})  "
        f"evaluations {stage.zimage.evaluations} = {theirs.evaluations}  cosine {stage.cosine:.6f}"
    )


if __name__ == "__main__":
    main()
