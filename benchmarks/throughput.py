"""Many pictures by a plain loop over `pipe(...)` and by `generate_many`: what the overlap saves.

Each round makes the same pictures both ways, in turn, with another prompt for each picture and round, so that every
one is encoded. `--save` also writes them as PNG files, in the loop's body. The bits are compared.

    python benchmarks/throughput.py [--model real] [--device cuda] [--size 1024] [--count 8] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from zimage import GenerationRequest, ZImagePipeline
from zimage.bench.report import write
from zimage.files.recipe import pixel_digest
from zimage.testing import build_checkpoint
from zimage.testing.configs import SIZES

Report = dict[str, Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help=f"random weights ({', '.join(SIZES)}), demo, or a checkpoint")
    parser.add_argument("--variant", default="turbo", help="of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=256, help="pixels per side")
    parser.add_argument("--steps", type=int, help="the model's own number if not given")
    parser.add_argument("--count", type=int, default=6, help="pictures of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write each picture in the body of the loop")
    parser.add_argument("--output", type=Path, help="folder for the report")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pipe = load(arguments.model, arguments.variant, arguments.device, Path(scratch))
        report = measure(pipe, arguments, Path(scratch))
    for way in ("loop", "generate_many"):
        print(f"{way}: {report[way]['median']:.4f} s a picture")
    print(f"ratio: {report['ratio']:.3f} (loop / generate_many)")
    if arguments.output:
        name = f"throughput-{arguments.device}-{report['date']}"
        print(f"wrote {write(report, arguments.output, name)}")


def load(model: str, variant: str, device: str, scratch: Path) -> ZImagePipeline:
    """The pipeline, of random weights where `model` is a size of those."""
    if model in SIZES:
        model = str(build_checkpoint(scratch / model, size=model, variant=variant))
    pipe = ZImagePipeline.from_pretrained(model, device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(pipe: ZImagePipeline, arguments: argparse.Namespace, scratch: Path) -> Report:
    """Seconds a picture of each round, their medians and their ratio; raises where the bits differ."""
    folder = scratch if arguments.save else None
    seconds: dict[str, list[float]] = {"loop": [], "generate_many": []}
    for number in range(arguments.rounds + 1):
        requests = requests_of(number, arguments)
        ways = [("loop", plain(pipe, requests)), ("generate_many", together(pipe, requests))]
        digests = {}
        for way, pictures in ways if number % 2 else ways[::-1]:
            pipe.text_encoder.forget()
            elapsed, digests[way] = timed(pictures, folder, pipe.device)
            if number:  # the first round warms up
                seconds[way].append(elapsed / len(requests))
        if digests["loop"] != digests["generate_many"]:
            raise SystemExit("the pictures are not the same bits")
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    name = torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else platform.machine()
    return {
        "date": date.today().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        **{way: {"median": medians[way], "seconds": times} for way, times in seconds.items()},
        "ratio": medians["loop"] / medians["generate_many"],
    }


def requests_of(number: int, arguments: argparse.Namespace) -> list[GenerationRequest]:
    """The pictures of a round."""
    options: Report = {"height": arguments.size, "width": arguments.size, "any_size": True}
    if arguments.steps is not None:
        options["num_inference_steps"] = arguments.steps
    texts = [f"a photograph of harbour {index} at dawn, day {number}" for index in range(arguments.count)]
    return [GenerationRequest(text, seed=seed, **options) for seed, text in enumerate(texts)]


def plain(pipe: ZImagePipeline, requests: Sequence[GenerationRequest]) -> Iterable[Image.Image]:
    """Pictures by a loop."""
    for request in requests:
        yield pipe([request]).images[0]


def together(pipe: ZImagePipeline, requests: Sequence[GenerationRequest]) -> Iterable[Image.Image]:
    """Pictures by `generate_many`."""
    for drawn in pipe.generate_many(requests):
        yield drawn.image


def timed(pictures: Iterable[Image.Image], folder: Path | None, device: torch.device) -> tuple[float, list[str]]:
    """Seconds that the pictures took, and their digests."""
    made: list[Image.Image] = []
    start = time.perf_counter()
    for number, picture in enumerate(pictures):
        made.append(picture)
        if folder is not None:
            picture.save(folder / f"{number}.png")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, [pixel_digest(picture) for picture in made]


if __name__ == "__main__":
    main()
