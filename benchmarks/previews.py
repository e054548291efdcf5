"""How much of a picture an affine preview shows: the fitted map beside the best that there is for these pictures.

Both are held against the mean colours of 8 x 8 pixels of decoded pictures: the share of the variance that is explained.
The best map is fitted to those very pictures.

    python benchmarks/previews.py [--model demo] [--count 24] [--output FOLDER]
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from zimage import ZImagePipeline
from zimage.bench.report import write
from zimage.models.preview import fit_preview

SHAPES = ("circle", "square", "triangle", "star", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
GROUNDS = ("white", "grey", "black")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-turbo", help="demo, or a checkpoint")
    parser.add_argument("--count", type=int, default=24, help="pictures")
    parser.add_argument("--output", type=Path, help="folder for the report")
    arguments = parser.parse_args()
    pipe = ZImagePipeline.from_pretrained(arguments.model, dtype="float32")
    report = {
        "date": date.today().isoformat(),
        "model": arguments.model,
        "pictures": arguments.count,
        **shares(pipe, arguments.count),
    }
    print(
        f"variance explained: fitted to patterns {report['fitted']:.3f}, fitted to these pictures {report['best']:.3f}"
    )
    if arguments.output:
        print(f"wrote {write(report, arguments.output, f'previews-{arguments.model}-{date.today()}')}")


def shares(pipe: ZImagePipeline, count: int) -> dict[str, float]:
    """The shares of the variance of colours that both maps explain."""
    inputs, colours = [], []
    for index in range(count):
        prompt = f"a {COLOURS[index % 8]} {SHAPES[index % 5]} on a {GROUNDS[index % 3]} background"
        latents = pipe(prompt, seed=index, output_type="latent", progress=False).images[0]
        pixels = pipe.autoencoder.decode(latents[None]).float().cpu()
        inputs.append(latents.float().cpu().flatten(1).T)
        colours.append(F.adaptive_avg_pool2d(pixels, latents.shape[1:]).flatten(2)[0].T)
    seen, wanted = torch.cat(inputs), torch.cat(colours)
    preview = fit_preview(pipe.autoencoder.vae)
    fitted = (seen @ preview.weights.cpu() + preview.offset.cpu()).clamp(0, 1)
    extended = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
    best = (extended @ torch.linalg.lstsq(extended, wanted).solution).clamp(0, 1)
    return {"fitted": explained(fitted, wanted), "best": explained(best, wanted)}


def explained(made: Tensor, wanted: Tensor) -> float:
    """1 less the ratio of squared errors to squared distances from the mean."""
    return 1 - float((made - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())


if __name__ == "__main__":
    main()
