"""What layers and attention in 8 bits do to pictures: the tables of docs/memory.md.

Every setting draws the same captions from the same seeds, in turn. Closeness is that of the final latents to those of
layers in full, as cosine; what a demo model draws is read by the judge. Then one evaluation of the transformer at a
time, on noised latents, without what follows from it: of which blocks and which layers the error comes when they round
their input. Random weights are of a size of `zimage.testing`. On a CPU products of rounded numbers are computed wider,
which is slower and has the same meaning; attention in float8 is written out.

    python benchmarks/rounding.py [--models demo-turbo,demo] [--count 30] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage import GenerationRequest, ZImagePipeline, ZImageWarning
from zimage.bench.report import write
from zimage.models.quantized import QuantizedLinear
from zimage.testing import build_checkpoint
from zimage.training import judge
from zimage.training.captions import evaluation_captions
from zimage.variants import DEMOS

Row = dict[str, Any]
Picks = dict[str, Callable[[str], bool]]
KINDS = ("int8", "float8")
SETTINGS: dict[str, Row] = {"full": {"weight_dtype": "full"}} | {
    f"{kind}, {what}": {"weight_dtype": kind, "quantize_activations": rounds}
    for kind in KINDS
    for what, rounds in (("weights", False), ("weights and activations", True))
}
SETTINGS |= {
    "float8, attention too": {**SETTINGS["float8, weights and activations"], "attention": True},
    "full, attention in float8": {"weight_dtype": "full", "attention": True},
}
"""The first is what the others are compared with."""
SIGMAS = (0.95, 0.8, 0.5, 0.2)
RANDOM = {"height": 256, "width": 256, "num_inference_steps": 4}
SENTENCES = ("a red fox in the snow", "an old house by the sea at night")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo-turbo,demo", help="demos, or sizes of random weights: small")
    parser.add_argument("--count", type=int, default=30, help="captions of each kind for the demos")
    parser.add_argument("--probes", type=int, default=6, help="captions whose evaluations are taken apart")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=ZImageWarning)  # that a CPU is slower so is known
    report: Row = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models.split(","):
            source, captions, options = subject(model, arguments.count, Path(scratch))
            place = {"device": arguments.device, "dtype": arguments.dtype}
            pictures = draw_all(source, captions, options, place)
            parts = take_apart(source, captions[: arguments.probes], options, place)
            report[model] = {"pictures": pictures, "evaluations": parts}
            for title, rows in report[model].items():
                print(f"\n{model}: {title}\n")
                for row in rows:
                    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if arguments.output:
        name = f"rounding-{arguments.models.replace(',', '-')}-{arguments.device}-{report['date']}"
        print(f"wrote {write(report, arguments.output, name)}")


def subject(model: str, count: int, scratch: Path) -> tuple[Any, list[tuple[str, Any]], Row]:
    """What to load, the captions with what they claim, single and pair in turn, and the options of a picture."""
    if model in DEMOS:
        kinds = [evaluation_captions(kind, count, 0) for kind in ("single", "pair")]
        return model, [caption for both in zip(*kinds, strict=True) for caption in both], {}
    return build_checkpoint(scratch / model, size=model, dtype="bfloat16"), [(one, None) for one in SENTENCES], RANDOM  # type: ignore[arg-type]


def draw_all(source: Any, captions: Sequence[tuple[str, Any]], options: Row, place: Row) -> list[Row]:
    """One row for each setting."""
    pipes = {name: load(source, place, **setting) for name, setting in SETTINGS.items()}
    outcomes: dict[str, list[Row]] = {name: [] for name in pipes}
    for seed, (text, claims) in enumerate(captions):
        for name, pipe in pipes.items():
            start = time.perf_counter()
            *_, last = pipe.stream(GenerationRequest(text, seed=seed, **options), embed_recipe=False)
            outcome: Row = {"seconds": time.perf_counter() - start, "latents": last.latents.float().cpu().flatten()}
            if claims is not None:
                outcome["right"] = judge.agrees(judge.read(last.image), claims)
            outcomes[name].append(outcome)
    exact = next(iter(outcomes.values()))
    return [summary(name, done, exact) for name, done in outcomes.items()]


def load(source: Any, place: Row, attention: bool = False, **setting: Any) -> ZImagePipeline:
    """A pipeline, with attention in float8 if that is asked for."""
    pipe = ZImagePipeline.from_pretrained(source, **place, **setting)
    if attention and pipe.device.type == "cuda":
        pipe.set_attention_backend("float8")
    elif attention:
        pipe.transformer.attend = narrow_attention
    return pipe


def narrow_attention(query: Tensor, key: Tensor, value: Tensor, *, backend: Any = None) -> Tensor:
    """Rounds what the kernel does: queries and keys with one scale, values by channel, weights below the largest."""
    query, key, value = (one.float().transpose(1, 2) for one in (query, key, value))  # (B, heads, N, head_dim)
    scores = narrowed(query, query.abs().amax()) @ narrowed(key, key.abs().amax()).transpose(2, 3)
    scores = scores * query.shape[3] ** -0.5
    weights = 256 * torch.exp(scores - scores.amax(3, keepdim=True))
    mixed = weights.to(torch.float8_e4m3fn).float() @ narrowed(value, value.abs().amax(2, keepdim=True))
    return (mixed / weights.sum(3, keepdim=True)).transpose(1, 2)


def narrowed(wide: Tensor, most: Tensor) -> Tensor:
    """`wide` as float8 with a scale that takes `most` to the largest number of it, and back."""
    scale = (most / 448).clamp(min=2.0**-100)
    return (wide / scale).to(torch.float8_e4m3fn).float() * scale


def summary(name: str, outcomes: Sequence[Row], exact: Sequence[Row]) -> Row:
    """A setting beside the first one."""
    cosines = [
        torch.cosine_similarity(one["latents"], other["latents"], dim=0).item()
        for one, other in zip(outcomes, exact, strict=True)
    ]
    seconds = [statistics.median(one["seconds"] for one in done) for done in (exact, outcomes)]
    row: Row = {
        "setting": name,
        "median cosine": round(statistics.median(cosines), 5),
        "mean": round(statistics.mean(cosines), 5),
        "least": round(min(cosines), 5),
        "speed": round(seconds[0] / seconds[1], 2),
    }
    if "right" in outcomes[0]:
        for kind, part in (("single", outcomes[0::2]), ("pair", outcomes[1::2])):
            row[kind] = round(100 * statistics.mean(one["right"] for one in part), 1)
    return row


def take_apart(source: Any, captions: Sequence[tuple[str, Any]], options: Row, place: Row) -> list[Row]:
    """Relative errors of evaluations in percent, by noise level, while some layers round their input."""
    full = ZImagePipeline.from_pretrained(source, **place, weight_dtype="full")
    started = [start(full, text, seed, options) for seed, (text, _) in enumerate(captions)]
    exact = [evaluate(full, *one) for one in started]
    rows = []
    for kind in KINDS:
        pipe = ZImagePipeline.from_pretrained(source, **place, weight_dtype=kind)
        layers = {name: layer for name, layer in pipe.transformer.named_modules() if isinstance(layer, QuantizedLinear)}
        for title, picks in picked(len(pipe.transformer.layers)).items():
            for name, layer in layers.items():
                layer.rows = kind if picks(name) else None
            found = [evaluate(pipe, *one) for one in started]
            errors = [
                statistics.mean(
                    float((one[level] - other[level]).norm() / other[level].norm())
                    for one, other in zip(found, exact, strict=True)
                )
                for level in range(len(SIGMAS))
            ]
            levels = zip(SIGMAS, errors, strict=True)
            rows.append(
                {"rounds": f"{kind}, {title}", **{f"{sigma}": round(100 * error, 3) for sigma, error in levels}}
            )
    return rows


def picked(blocks: int) -> Picks:
    """Which layers round their input."""
    last = f"layers.{blocks - 1}."
    return {
        "no input": lambda name: False,
        "every input": lambda name: True,
        "all but the caption refiner's": lambda name: not name.startswith("context_refiner."),
        "all but the noise refiner's": lambda name: not name.startswith("noise_refiner."),
        "all but the first block's": lambda name: not name.startswith("layers.0."),
        "all but the last block's": lambda name: not name.startswith(last),
        "all but w2's": lambda name: not name.endswith(".w2"),
        "all but w1's and w3's": lambda name: not name.endswith((".w1", ".w3")),
        "all but to_out's": lambda name: ".to_out." not in name,
        "all but queries', keys' and values'": lambda name: not name.endswith((".to_q", ".to_k", ".to_v")),
        "as quantize_activations=True has it": lambda name: (
            not name.startswith(("context_refiner.", "noise_refiner.", last))
        ),
    }


@torch.no_grad()
def start(pipe: ZImagePipeline, text: str, seed: int, options: Row) -> tuple[Tensor, list[Tensor]]:
    """Caption features, and the latents of a picture with as much noise in them as each of `SIGMAS` says."""
    *_, last = pipe.stream(GenerationRequest(text, seed=seed, **options), embed_recipe=False)
    encoder, latents = pipe.text_encoder, last.latents.float()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents.device)
    features = encoder.encode(encoder.tokenize(text, 512))
    return features, [sigma * noise + (1 - sigma) * latents for sigma in SIGMAS]


@torch.no_grad()
def evaluate(pipe: ZImagePipeline, features: Tensor, latents: Sequence[Tensor]) -> list[Tensor]:
    """The transformer's result at each noise level."""
    transformer = pipe.transformer
    caption = transformer.encode_caption(features)
    grid = transformer.grid(*latents[0].shape[2:], caption.length)
    levels = transformer.modulations(torch.tensor([1 - sigma for sigma in SIGMAS], device=pipe.device))
    return [
        transformer.denoise(one, caption, grid, level).float().flatten()
        for one, level in zip(latents, levels, strict=True)
    ]


if __name__ == "__main__":
    main()
