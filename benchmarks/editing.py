"""What the models that come along do to pictures: the tables of docs/demo.md on inpainting, strength and a second pass.

A model draws captions that are held out from training (`zimage.training.captions.evaluation_captions`), and those
pictures that the judge reads as asked, until there are `--count`, are changed by the same model. Caption and picture k
have the seed `--seed` + k. "single" captions name one object and all about it, "pair" captions two and their relation.

- inpainting: the box around the first object that is named, `--border` pixels wider and then out to the latents' grid,
  is repainted by a caption that gives this object another colour. "colour": the judge reads something of the new colour
  with its middle in the box, and nothing of the old one. "as asked": the picture is as the whole caption says.
  "masked" is the boxes' share of the pictures, "outside" counts values of pixels outside them that changed.
- strength: a picture of a pair becomes that of the next one's caption. Of the objects of the picture before, "place" is
  the share that has an object after within 16 pixels of its middle, and "colour" the share that has one of its own
  colour there. "change" is the mean difference in levels of 255.
- hires: pictures of pairs are drawn again with a second pass at twice the size. "as asked": the judge, which knows
  shapes by their size in pixels, reads the picture at half its size as the caption says. "sharpness" is the sum of
  squared differences between neighbours beside that of the first pass's picture enlarged, of which "change" is the mean
  difference. The row without an upscale is a picture of that size in one pass.

    python benchmarks/editing.py --output benchmarks/results
    python benchmarks/editing.py [--tables inpainting] [--models demo] [--count 100] [--seed 0] [--strengths 0.4,1]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from zimage import ZImagePipeline
from zimage.bench.report import write
from zimage.hires import UPSCALES, Hires
from zimage.training import judge
from zimage.training.captions import evaluation_captions, phrase
from zimage.training.world import COLOURS, Claims
from zimage.variants import DEMOS

Row = dict[str, Any]
Pixels = npt.NDArray[np.uint8]
GRID, NEAR = 8, 16


@dataclass(frozen=True)
class Source:
    """A picture that is as its caption asks."""

    seed: int
    text: str
    claims: Claims
    pixels: Pixels
    reading: judge.Reading

    def rng(self) -> np.random.Generator:
        """What else about it is drawn with."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Settings:
    """What may be asked for."""

    strengths: tuple[float, ...]
    keeps: tuple[bool, ...]
    border: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--models", default=",".join(DEMOS))
    parser.add_argument("--kinds", default=",".join(KINDS), help="of captions for inpainting")
    parser.add_argument("--count", type=int, default=100, help="pictures of each row")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture, and of the order of captions")
    parser.add_argument("--strengths", default="0.2,0.4,0.6,0.8,1.0")
    parser.add_argument("--border", type=int, default=32, help="pixels around an object that are repainted too")
    parser.add_argument("--output", type=Path, help="folder for the figures, as JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.tables.split(",")) - set(TABLES):
        parser.error(f"there are no tables {', '.join(sorted(unknown))}; choose from {', '.join(TABLES)}")
    for name in arguments.models.split(","):
        pipe = ZImagePipeline.from_pretrained(name, device="cpu")
        keeps = (False, True) if pipe.variant.num_inference_steps < 10 else (False,)  # of 50 it leaves enough
        settings = Settings(tuple(map(float, arguments.strengths.split(","))), keeps, arguments.border)
        found: dict[str, list[Source]] = {}
        for table in arguments.tables.split(","):
            rows = []
            for kind in arguments.kinds.split(",") if table == "inpainting" else ("pair",):
                if kind not in found:
                    found[kind] = list(sources(pipe, kind, arguments.count, arguments.seed))
                for row in TABLES[table](pipe, found[kind], settings):
                    rows.append({"captions": kind, "count": arguments.count, "seed": arguments.seed, **row})
                    print(
                        f"{name} {table}: " + ", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True
                    )
            if arguments.output:
                recipe = {"sampler": pipe.variant.sampler, "guidance_scale": pipe.variant.guidance_scale}
                drawn = {"model": pipe.model["fingerprint"], **recipe}
                of = f", border {arguments.border}, seed {arguments.seed}" if table == "inpainting" else ""
                keep(arguments.output, f"{table}, {name}{of}", {**drawn, "rows": rows})


def keep(folder: Path, name: str, result: Row) -> None:
    """Put a table's figures into today's file."""
    title = f"editing-cpu-{date.today().isoformat()}"
    file = folder / f"{title}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    machine = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__}
    write(results | {name: {**machine, **result}}, folder, title)


def of_inpainting(pipe: ZImagePipeline, found: Sequence[Source], settings: Settings) -> Iterator[Row]:
    """Another colour for an object."""
    for keep_steps, strength in asked_strengths(settings):
        colour, whole, shares, outside = [], [], [], 0
        for source in found:
            rng, first = source.rng(), source.claims.objects[0]
            taken = {one.colour for one in source.claims.objects}
            wanted = str(rng.choice([one for one in COLOURS if one not in taken]))
            claims = replace(source.claims, objects=(replace(first, colour=wanted), *source.claims.objects[1:]))
            mask = around(source, first.colour, settings.border)
            options = {"strength": strength, "keep_steps": keep_steps, "mask_image": mask}
            made = change(pipe, source, phrase(claims, rng, "en"), options)
            seen = judge.read(made)
            there = {one.colour for one in seen.objects if mask[round(one.centre[1]), round(one.centre[0])]}
            colour.append(wanted in there and first.colour not in {one.colour for one in seen.objects})
            whole.append(judge.agrees(seen, claims))
            shares.append(float(mask.mean()))
            outside += int((made != source.pixels)[~mask].sum())
        yield {
            "border": settings.border, "masked": round(100 * statistics.mean(shares), 1),
            "keep_steps": keep_steps, "strength": strength,
            "steps": steps_of(pipe, found[0], options), "colour": percent(colour), "as asked": percent(whole),
            "outside": outside,
        }  # fmt: skip


def of_strength(pipe: ZImagePipeline, found: Sequence[Source], settings: Settings) -> Iterator[Row]:
    """Another caption for a picture."""
    for keep_steps, strength in asked_strengths(settings):
        options = {"strength": strength, "keep_steps": keep_steps}
        place, colour, changes, whole = [], [], [], []
        for source, other in zip(found, [*found[1:], found[0]], strict=True):
            made = change(pipe, source, phrase(other.claims, source.rng(), "en"), options)
            seen = judge.read(made)
            for one in source.reading.objects:
                near = [after.colour for after in seen.objects if math.dist(after.centre, one.centre) <= NEAR]
                place.append(bool(near))
                colour.append(one.colour in near)
            changes.append(float(np.abs(made.astype(int) - source.pixels).mean()))
            whole.append(judge.agrees(seen, other.claims))
        yield {
            "keep_steps": keep_steps, "strength": strength, "steps": steps_of(pipe, found[0], options),
            "place": percent(place), "colour": percent(colour), "change": round(statistics.mean(changes), 1),
            "as asked": percent(whole),
        }  # fmt: skip


def of_hires(pipe: ZImagePipeline, found: Sequence[Source], settings: Settings) -> Iterator[Row]:
    """A second pass at twice the size."""
    height, width = (2 * side for side in found[0].pixels.shape[:2])
    ways: list[Row] = [{"hires": Hires(2, strength, way)} for way in UPSCALES for strength in settings.strengths]
    for options in [*ways, {"height": height, "width": width}]:
        whole, sharp, changes, steps = [], [], [], 0
        for source in found:
            output = pipe(source.text, seed=source.seed, progress=False, **options)
            made, steps = np.asarray(output.images[0]), output.requests[0].steps
            larger = np.asarray(Image.fromarray(source.pixels).resize((width, height), Image.Resampling.BICUBIC))
            half = np.asarray(Image.fromarray(made).resize((width // 2, height // 2), Image.Resampling.BOX))
            whole.append(judge.agrees(judge.read(half), source.claims))
            sharp.append(edges(made) / edges(larger))
            changes.append(float(np.abs(made.astype(int) - larger).mean()))
        hires = options.get("hires")
        yield {
            "upscale": hires.upscale if hires else None, "strength": hires.strength if hires else None,
            "steps": steps, "as asked": percent(whole), "sharpness": round(statistics.median(sharp), 2),
            "change": round(statistics.mean(changes), 1),
        }  # fmt: skip


def edges(pixels: Pixels) -> float:
    """The sum of squared differences between neighbours."""
    wide = pixels.astype(float)
    return sum(float((np.diff(wide, axis=axis) ** 2).sum()) for axis in (0, 1))


TABLES: dict[str, Callable[[ZImagePipeline, Sequence[Source], Settings], Iterator[Row]]] = {
    "inpainting": of_inpainting,
    "strength": of_strength,
    "hires": of_hires,
}
KINDS = ("single", "pair")


def sources(pipe: ZImagePipeline, kind: str, wanted: int, seed: int) -> Iterator[Source]:
    """So many pictures of captions of a kind that are as asked; the others are passed over."""
    captions, found = evaluation_captions(kind, 10 * wanted, seed), 0
    for number in count():
        if found == wanted:
            break
        text, claims = captions[number]
        pixels = np.asarray(pipe(text, seed=seed + number, progress=False).images[0])
        reading = judge.read(pixels)
        if judge.agrees(reading, claims):
            found += 1
            yield Source(seed + number, text, claims, pixels, reading)
    print(f"{wanted} pictures of {number} are as their {kind} captions ask", flush=True)


def asked_strengths(settings: Settings) -> Iterator[tuple[bool, float]]:
    """Pairs of `keep_steps` and strength; at 1 it changes nothing to keep them."""
    for keep_steps in settings.keeps:
        yield from ((keep_steps, strength) for strength in settings.strengths if strength < 1 or not keep_steps)


def change(pipe: ZImagePipeline, source: Source, caption: str, options: Row) -> Pixels:
    """The picture that becomes of it, with another seed's noise."""
    seed = 2**31 + source.seed
    return np.asarray(pipe(caption, image=source.pixels, seed=seed, progress=False, **options).images[0])


def steps_of(pipe: ZImagePipeline, source: Source, options: Row) -> int:
    """Denoising steps of such a change."""
    (request,) = pipe("", image=source.pixels, seed=0, progress=False, output_type="latent", **options).requests
    return request.steps


def around(source: Source, colour: str | None, border: int) -> npt.NDArray[np.bool_]:
    """A mask of the box around the object of a colour, out to the grid of the latents."""
    (seen,) = (one for one in source.reading.objects if one.colour == colour)
    left, top, right, bottom = seen.box
    mask = np.zeros(source.pixels.shape[:2], dtype=bool)
    low = [max(0, side - border) // GRID * GRID for side in (top, left)]
    high = [-(-(side + border) // GRID) * GRID for side in (bottom, right)]
    mask[low[0] : high[0], low[1] : high[1]] = True
    return mask


def percent(right: Sequence[bool]) -> float:
    """With one place."""
    return round(100 * sum(right) / len(right), 1)


if __name__ == "__main__":
    main()
