"""How far zimage's latents are from diffusers', over sizes, guidance, precisions and checkpoints: the tables of
docs/parity.md.

Errors are relative: the largest difference over the largest value, and the root mean square of both. "features" rows
give both sides the same caption features, "prompt" rows let each side encode the prompt, and "to float32" is each
side's distance to diffusers' float32 result, the scale on which a half precision's error should be read. The second
table is of pictures from an image, the third of those that a ControlNet steers, beside diffusers' pipelines for them,
each side with a generator of the same seed.

    python benchmarks/parity.py [--tables noise,images,control] [--sizes tiny,small,wide] [--device cpu]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor

from zimage import ZImagePipeline
from zimage.testing import build_checkpoint, build_controlnet

PROMPT, NEGATIVE = "a red fox in the snow, 一只红狐狸", "blurry, low quality, watermark " * 12
STEPS = {"tiny": 8, "small": 4, "wide": 2}
STRENGTHS = (0.3, 0.6, 1.0)
SCALES = (0.3, 0.75, 1.5)


def main() -> None:
    """Print a row for each checkpoint, precision and guidance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--sizes", default="tiny,small,wide")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for table in arguments.tables.split(","):
        header, compare_in = TABLES[table]
        print(f"\n{header}\n|{'---|' * (header.count('|') - 1)}")
        for size in arguments.sizes.split(","):
            with tempfile.TemporaryDirectory() as scratch:
                folder = build_checkpoint(Path(scratch) / "model", size=size, variant="base")
                dtypes = ("bfloat16",) if size == "wide" else ("float32", "bfloat16", "float16")
                references: dict[Any, Tensor] = {}
                for dtype in dtypes:
                    compare_in(folder, size, dtype, arguments.device, references)


def compare(folder: Path, size: str, dtype: str, device: str, references: dict[Any, Tensor]) -> None:
    """Rows of one checkpoint in one precision; `references` collects diffusers' float32 latents."""
    theirs = diffusers.ZImagePipeline.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    theirs.set_progress_bar_config(disable=True)
    ours = ZImagePipeline.from_diffusers(theirs)
    sizes = ((256, 256), (256, 272)) if size != "wide" else ((256, 256),)
    for guidance, shared in itertools.product((0.0, 0.7, 4.0), (True, False)):
        rows = [latents(ours, theirs, guidance, shared, size, *sides) for sides in sizes]
        worst = [max(column) for column in zip(*(distance(*row) for row in rows), strict=True)]
        same = all(torch.equal(*row) for row in rows)
        cells = [size, dtype, f"{guidance:g}", "features" if shared else "prompt"]
        cells += [f"{value:.1e}" for value in worst] + ["yes" if same else "no"]
        key = (guidance, shared)
        if dtype == "float32":
            references[key] = [row[1] for row in rows]
        for side in (0, 1):
            known = references.get(key)
            far = max(distance(row[side], one)[1] for row, one in zip(rows, known, strict=True)) if known else None
            cells.append("" if far is None else f"{far:.1e}")
        print("|", " | ".join(cells), "|", flush=True)


def latents(
    ours: Any, theirs: Any, guidance: float, shared: bool, size: str, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """zimage's and diffusers' latents of one picture."""
    options = {
        "height": height,
        "width": width,
        "num_inference_steps": STEPS[size],
        "guidance_scale": guidance,
        "output_type": "latent",
        "latents": torch.randn(1, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(7)),
    }
    texts = {"prompt": PROMPT} | ({"negative_prompt": NEGATIVE} if guidance else {})
    if shared:
        texts = {f"{name}_embeds": theirs._encode_prompt([text]) for name, text in texts.items()}
    with torch.no_grad():
        expected = theirs(**texts, **options).images
        ours.text_encoder.forget()
        return ours(**texts, **options, progress=False).images.float().cpu(), expected.float().cpu()


def compare_images(folder: Path, size: str, dtype: str, device: str, _: dict[Any, Tensor]) -> None:
    """Rows of pictures from an image; in float32, as half precisions are in the table above."""
    if dtype != "float32":
        return
    parts = diffusers.ZImagePipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    ours = ZImagePipeline.from_diffusers(parts)
    mask = np.zeros((256, 272), np.float32)
    mask[70:190, 30:170] = 1
    for name, masks in (("ZImageImg2ImgPipeline", {}), ("ZImageInpaintPipeline", {"mask_image": mask})):
        theirs = getattr(diffusers, name)(**parts.components)
        theirs.set_progress_bar_config(disable=True)
        for guidance in (0.0, 4.0):
            rows = [distance(*changed(ours, theirs, guidance, strength, size, masks)) for strength in STRENGTHS]
            worst = [f"{max(column):.1e}" for column in zip(*rows, strict=True)]
            print("|", " | ".join([size, name, f"{guidance:g}", *worst]), "|", flush=True)


def changed(
    ours: Any, theirs: Any, guidance: float, strength: float, size: str, masks: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """zimage's and diffusers' latents of one picture from an image."""
    image = np.random.default_rng(0).random((1, 256, 272, 3), np.float32)
    options = {"prompt": PROMPT, "num_inference_steps": STEPS[size], "guidance_scale": guidance, "strength": strength}
    options |= {"image": image, "output_type": "latent", **masks} | ({"negative_prompt": NEGATIVE} if guidance else {})
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        expected = theirs(**options, height=256, width=272, generator=generator).images
        ours.text_encoder.forget()
        return ours(**options, seed=7, progress=False).images.float().cpu(), expected.float().cpu()


def compare_control(folder: Path, size: str, dtype: str, device: str, _: dict[Any, Tensor]) -> None:
    """Rows of pictures that a ControlNet of each version steers, in float32; the control image is edges on black."""
    if dtype != "float32":
        return
    parts = diffusers.ZImagePipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    image, mask = np.random.default_rng(0).random((1, 256, 272, 3), np.float32), np.zeros((256, 272), np.float32)
    mask[70:190, 30:170] = 1
    edges = np.zeros((1, 256, 272, 3), np.float32)
    edges[:, ::19] = edges[:, :, 100:103] = 1
    for version in ("1.0", "2.0", "2.1"):
        place = build_controlnet(folder.parent / version, size=size, version=version)
        net = diffusers.ZImageControlNetModel.from_pretrained(place).to(device)
        ours = ZImagePipeline.from_diffusers(parts)
        ours.load_controlnet(place)
        kinds = {
            "ZImageControlNetPipeline": {},
            "ZImageControlNetInpaintPipeline": {"image": image, "mask_image": mask},
        }
        for name, masks in list(kinds.items())[: 1 if version == "1.0" else 2]:
            theirs = getattr(diffusers, name)(**parts.components, controlnet=net)
            theirs.set_progress_bar_config(disable=True)
            for guidance in (0.0, 4.0):
                rows = [
                    distance(
                        *steered(ours, theirs, guidance, size, {"controlnet_conditioning_scale": scale, **masks}, edges)
                    )
                    for scale in SCALES
                ]
                worst = [f"{max(column):.1e}" for column in zip(*rows, strict=True)]
                print("|", " | ".join([size, version, name, f"{guidance:g}", *worst]), "|", flush=True)


def steered(
    ours: Any, theirs: Any, guidance: float, size: str, asked: dict[str, Any], edges: Any
) -> tuple[Tensor, Tensor]:
    """zimage's and diffusers' latents of one picture with a control image."""
    options = {"prompt": PROMPT, "num_inference_steps": STEPS[size], "guidance_scale": guidance, "control_image": edges}
    options |= {"output_type": "latent", **asked} | ({"negative_prompt": NEGATIVE} if guidance else {})
    with torch.no_grad():
        expected = theirs(**options, height=256, width=272, generator=torch.Generator().manual_seed(7)).images
        ours.text_encoder.forget()
        return ours(**options, seed=7, progress=False).images.float().cpu(), expected.float().cpu()


TABLES = {
    "noise": (
        "| checkpoint | dtype | guidance | from | max | rms | same bits | zimage to float32 | diffusers to float32 |",
        compare,
    ),
    "images": ("| checkpoint | diffusers' pipeline | guidance | max | rms |", compare_images),
    "control": ("| checkpoint | ControlNet | diffusers' pipeline | guidance | max | rms |", compare_control),
}


def distance(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square difference, relative to `other`."""
    difference = one - other
    return (difference.abs().max() / other.abs().max()).item(), (difference.norm() / other.norm()).item()


if __name__ == "__main__":
    main()
