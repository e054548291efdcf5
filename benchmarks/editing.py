"""What the models that come along do to images: the tables of docs/demo.md on inpainting, outpainting and strength.

Images are scenes of the drawn world, of a stream that no training used; picture k has the seed k. What is in a picture
is read by `zimage.training.judge`.

- inpainting: a box around one object is repainted, and the caption gives that object another colour. "colour": one
  has it and none has the old one. "as asked" is the whole caption, with shape and size; "outside" counts values of
  pixels outside the box that changed.
- outpainting: 32 pixels are added on either side of a scene of one object, described by its caption.
- strength: the image is a scene of two objects, the caption describes another one. "layout" is the overlap of what is
  coloured in both, over their union; "change" the mean difference in levels of 255.

    python benchmarks/editing.py [--tables inpainting,strength] [--count 100] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zimage import ZImagePipeline
from zimage.bench.report import write
from zimage.training import judge
from zimage.training.captions import phrase
from zimage.training.scenes import draw_scene, render
from zimage.training.world import COLOURS, Claims, ObjectClaim, Scene
from zimage.variants import DEMOS

Row = dict[str, Any]
Pixels = npt.NDArray[np.uint8]
STREAM = 90_210
STRENGTHS = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
MASKED_STRENGTHS = (0.4, 0.5, 0.6, 1.0)
GRID, BORDER, ADDED = 8, 8, 32


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--models", default=",".join(DEMOS))
    parser.add_argument("--count", type=int, default=100, help="images of each row")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.tables.split(",")) - set(TABLES):
        parser.error(f"there are no tables {', '.join(sorted(unknown))}; choose from {', '.join(TABLES)}")
    pipes = {name: ZImagePipeline.from_pretrained(name, device="cpu") for name in arguments.models.split(",")}
    report: Row = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "models": {name: pipe.model["fingerprint"] for name, pipe in pipes.items()},
        "count": arguments.count,
    }
    for table in arguments.tables.split(","):
        print(f"\n{table}\n")
        report[table] = []
        for name, pipe in pipes.items():
            for row in TABLES[table](pipe, arguments.count):
                report[table].append({"model": name, **row})
                print("  ".join(f"{key} {value}" for key, value in report[table][-1].items()), flush=True)
        if arguments.output:
            write(report, arguments.output, f"editing-cpu-{report['date']}")


def of_inpainting(pipe: ZImagePipeline, count: int) -> Iterator[Row]:
    """Scenes of one object, and of two of which one is repainted."""
    for objects in (1, 2):
        for strength in MASKED_STRENGTHS:
            options = {"strength": strength, "keep_steps": few_steps(pipe)}
            whole, colour, outside = [], [], 0
            for number, (scene, rng) in enumerate(scenes(objects, count)):
                image, old = render(scene), scene.objects[0].colour
                wanted = str(rng.choice([one for one in COLOURS if all(one != seen.colour for seen in scene.objects)]))
                changed = replace(scene, objects=(replace(scene.objects[0], colour=wanted), *scene.objects[1:]))
                mask = around(image, old)
                made = draw(pipe, changed, rng, number, image=image, mask_image=mask, **options)
                outside += int((made != image)[~mask].sum())
                reading = judge.read(made)
                colours = {seen.colour for seen in reading.objects}
                colour.append(wanted in colours and old not in colours)
                whole.append(judge.agrees(reading, claims_of(changed)))
            yield {"objects": objects, **options, "colour": percent(colour), "as asked": percent(whole)} | {
                "outside": outside
            }


def of_outpainting(pipe: ZImagePipeline, count: int) -> Iterator[Row]:
    """Scenes of one object with room on either side."""
    right, outside = [], 0
    for number, (scene, rng) in enumerate(scenes(1, count, canvas=(96, 160))):
        image = render(scene)
        made = draw(pipe, scene, rng, number, image=image, padding=(ADDED, 0, ADDED, 0))
        outside += int((made[:, ADDED:-ADDED] != image).sum())
        claims = claims_of(scene)
        only = replace(claims.objects[0], size=None)  # which goes with the size of the picture
        right.append(judge.agrees(judge.read(made), replace(claims, objects=(only,))))
    yield {"as asked": percent(right), "outside": outside}


def of_strength(pipe: ZImagePipeline, count: int) -> Iterator[Row]:
    """Steps as they are, and kept where that makes a difference."""
    for keep_steps in (False, True) if few_steps(pipe) else (False,):
        for strength in STRENGTHS:
            layouts, changes, right, steps = [], [], [], 0
            pairs = zip(scenes(2, count), scenes(2, count, stream=STREAM + 1), strict=True)
            for number, ((scene, _), (other, rng)) in enumerate(pairs):
                image = render(scene)
                options = {"image": image, "strength": strength, "keep_steps": keep_steps}
                made = draw(pipe, other, rng, number, **options)
                layouts.append(overlap(image, made))
                changes.append(float(np.abs(made.astype(int) - image).mean()))
                right.append(judge.agrees(judge.read(made), claims_of(other)))
                steps = steps_of(pipe, options)
            yield {
                "keep_steps": keep_steps,
                "strength": strength,
                "steps": steps,
                "layout": round(statistics.mean(layouts), 2),
                "change": round(statistics.mean(changes), 1),
                "as asked": percent(right),
            }


TABLES: dict[str, Callable[[ZImagePipeline, int], Iterator[Row]]] = {
    "inpainting": of_inpainting,
    "outpainting": of_outpainting,
    "strength": of_strength,
}


def scenes(
    objects: int, count: int, *, stream: int = STREAM, canvas: tuple[int, int] = (128, 128)
) -> Iterator[tuple[Scene, np.random.Generator]]:
    """Scenes of so many objects, two beside each other, and what is drawn with next."""
    index = found = 0
    while found < count:
        rng = np.random.default_rng([stream, objects, index])
        scene = draw_scene(rng, objects=objects, canvas=canvas)
        index += 1
        if all(relation != "inside" for _, relation, _ in scene.relations):
            found += 1
            yield scene, rng


def few_steps(pipe: ZImagePipeline) -> bool:
    """Whether a model has so few steps that it matters to keep them."""
    return pipe.variant.num_inference_steps < 10


def claims_of(scene: Scene) -> Claims:
    """All there is to say of a scene."""
    objects = tuple(ObjectClaim(shape=one.shape, colour=one.colour, size=one.size) for one in scene.objects)
    return Claims(objects=objects, relations=scene.relations[:1], background=scene.background)


def draw(pipe: ZImagePipeline, scene: Scene, rng: np.random.Generator, seed: int, **options: Any) -> Pixels:
    """A picture from an image, with the caption of `scene`."""
    caption = phrase(claims_of(scene), rng, "en")
    return np.asarray(pipe(caption, seed=seed, progress=False, **options).images[0])


def steps_of(pipe: ZImagePipeline, options: Row) -> int:
    """Denoising steps of such a call."""
    (request,) = pipe("", seed=0, progress=False, output_type="latent", **options).requests
    return request.steps


def around(image: Pixels, colour: str) -> npt.NDArray[np.bool_]:
    """A mask of the box around the object of a colour, out to the grid of the latents."""
    (seen,) = (one for one in judge.read(image).objects if one.colour == colour)
    left, top, right, bottom = seen.box
    mask = np.zeros(image.shape[:2], dtype=bool)
    low = [max(0, side - BORDER) // GRID * GRID for side in (top, left)]
    high = [-(-(side + BORDER) // GRID) * GRID for side in (bottom, right)]
    mask[low[0] : high[0], low[1] : high[1]] = True
    return mask


def overlap(one: Pixels, other: Pixels) -> float:
    """Of what is coloured in either picture, the share that is in both."""
    first, second = (np.ptp(picture.astype(int), axis=2) >= judge.SURE_CHROMA for picture in (one, other))
    return float((first & second).sum() / max(1, (first | second).sum()))


def percent(right: Sequence[bool]) -> float:
    """With one place."""
    return round(100 * sum(right) / len(right), 1)


if __name__ == "__main__":
    main()
