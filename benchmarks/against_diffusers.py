"""zimage beside diffusers: both sides interleaved in one process on the same weights, as ratios of medians.

Both load the same random-weight checkpoint. Every round uses a new prompt, so that no cache helps; both sides must
make the same number of transformer evaluations and latents that agree. Prints a table and, with --output, writes it
as JSON with machine and versions.

    python benchmarks/against_diffusers.py [--cases tiny,text,wide] [--rounds 15] [--device cpu] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from zimage import ZImagePipeline
from zimage.testing import build_checkpoint

SENTENCE = "a red fox in the snow next to an old wooden house under a blue sky in the morning light"


@dataclass(frozen=True)
class Case:
    """One comparison; `goal` is the ratio diffusers / zimage that it should reach."""

    name: str
    checkpoint: str
    dtype: str
    size: int
    steps: int
    goal: float
    guidance: float = 0.0
    text_only: bool = False


CASES = {
    "tiny": Case("tiny", "tiny", "bfloat16", 256, 8, 1.8),
    "tiny-fp32": Case("tiny-fp32", "tiny", "float32", 256, 8, 1.8),
    "tiny-cfg": Case("tiny-cfg", "tiny", "bfloat16", 256, 8, 1.0, guidance=4.0),
    "text": Case("text", "small", "bfloat16", 256, 1, 4.0, text_only=True),
    "text-fp32": Case("text-fp32", "small", "float32", 256, 1, 4.0, text_only=True),
    "small": Case("small", "small", "bfloat16", 512, 4, 1.0),
    "wide": Case("wide", "wide", "bfloat16", 512, 2, 1.0),
}


@dataclass(frozen=True)
class Result:
    """Medians in seconds, their ratio, and what proves that both sides did the same work."""

    case: str
    zimage_s: float
    diffusers_s: float
    ratio: float
    goal: float
    evaluations: tuple[int, int]
    cosine: float


def main() -> None:
    """Run the chosen cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="tiny,tiny-fp32,tiny-cfg,text,text-fp32,small,wide")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        results = []
        for name in arguments.cases.split(","):
            results.append(run_case(CASES[name], Path(scratch), arguments.rounds, arguments.device))
            print(row(results[-1]), flush=True)
    if arguments.output:
        write(results, arguments.output, arguments.device)


def row(result: Result) -> str:
    """A line of the table."""
    return (
        f"{result.case:10} zimage {result.zimage_s * 1e3:9.2f} ms  diffusers {result.diffusers_s * 1e3:9.2f} ms  "
        f"ratio {result.ratio:5.2f} (goal {result.goal:.1f})  "
        f"evaluations {result.evaluations}  cosine {result.cosine:.6f}"
    )


def run_case(case: Case, scratch: Path, rounds: int, device: str) -> Result:
    """Time one case; raises if both sides did not do the same work."""
    variant = "base" if case.guidance else "turbo"
    folder = scratch / f"{case.checkpoint}-{variant}"
    if not folder.exists():
        build_checkpoint(folder, size=case.checkpoint, variant=variant)
    ours = ZImagePipeline.from_pretrained(folder, dtype=case.dtype, device=device)
    theirs = diffusers.ZImagePipeline.from_pretrained(folder, dtype=getattr(torch, case.dtype)).to(device)
    theirs.set_progress_bar_config(disable=True)
    sides = text_sides(ours, theirs) if case.text_only else picture_sides(case, ours, theirs)
    counts = count_evaluations(ours.transformer, theirs.transformer)
    first = [side(0) for side in sides]
    evaluations = (counts["zimage"], counts["diffusers"])
    assert evaluations[0] == evaluations[1], f"unequal work: {evaluations} evaluations"
    cosine = torch.nn.functional.cosine_similarity(*(torch.as_tensor(one).double().flatten() for one in first), dim=0)
    assert cosine > 0.99, f"the outputs differ: cosine {cosine}"
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(1, rounds + 1):
        for side, taken in zip(sides, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            side(index)
            synchronize(device)
            taken.append(time.perf_counter() - start)
    medians = [statistics.median(taken) for taken in times]
    return Result(
        case.name, medians[0], medians[1], medians[1] / medians[0], case.goal, evaluations, round(float(cosine), 6)
    )


def picture_sides(case: Case, ours: Any, theirs: Any) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """Prompt to pixels on both sides, from the same seed."""
    import numpy as np

    options = {"height": case.size, "width": case.size, "num_inference_steps": case.steps}

    def zimage_side(index: int) -> Any:
        image = ours(prompt(index), seed=index, guidance_scale=case.guidance, progress=False, **options).images[0]
        return np.asarray(image, dtype=np.float32)

    def diffusers_side(index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        image = theirs(prompt(index), generator=generator, guidance_scale=case.guidance, **options).images[0]
        return np.asarray(image, dtype=np.float32)

    return zimage_side, diffusers_side


def text_sides(ours: Any, theirs: Any) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """A prompt of twenty words to caption features on both sides."""

    def zimage_side(index: int) -> torch.Tensor:
        encoder = ours.text_encoder
        return encoder.encode(encoder.tokenize(prompt(index, words=20), 512)).float()

    def diffusers_side(index: int) -> torch.Tensor:
        with torch.no_grad():
            return theirs._encode_prompt([prompt(index, words=20)])[0].float()

    return zimage_side, diffusers_side


def prompt(index: int, words: int = 8) -> str:
    """A plain English prompt of so many words and a number, which no other round has."""
    return " ".join(SENTENCE.split()[: words - 1]) + f" {index}"


def count_evaluations(ours: Any, theirs: Any) -> dict[str, int]:
    """Count transformer evaluations from now on, by image and guidance branch; the counters stay for the first run."""
    counts = {"zimage": 0, "diffusers": 0}
    denoise, forward = ours.denoise, theirs.forward

    def counted_denoise(latents: Any, *args: Any, **kwargs: Any) -> Any:
        counts["zimage"] += len(latents)
        return denoise(latents, *args, **kwargs)

    def counted_forward(latents: Any, *args: Any, **kwargs: Any) -> Any:
        counts["diffusers"] += len(latents)
        return forward(latents, *args, **kwargs)

    ours.denoise, theirs.forward = counted_denoise, counted_forward
    return counts


def synchronize(device: str) -> None:
    """Wait for a GPU; the CPU has nothing to wait for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def write(results: list[Result], folder: Path, device: str) -> None:
    """Keep the results with what they were measured on."""
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU"
    report = {
        "date": date.today().isoformat(),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "results": [asdict(result) for result in results],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"against-diffusers-{device.partition(':')[0]}-{report['date']}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
