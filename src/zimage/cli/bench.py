"""`zimage bench`: how fast each stage is here, beside diffusers. Translates and prints; `zimage.bench` measures."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.settings import KEPT_ROUNDS, ROUNDED, STAGES, Settings
from ..errors import RequestError
from .options import MODEL_HELP, Attention, Device, Dtype, Json, QuantizeActivations, Quiet, check_request
from .running import shows_progress


def bench(
    size: Annotated[
        str | None, typer.Option(help="Random weights: tiny, small, wide or real (20 GB); tiny if not given.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=f"Instead: {MODEL_HELP}")] = None,
    variant: Annotated[str | None, typer.Option(help="turbo, or base with guidance and a negative prompt.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    height: Annotated[int | None, typer.Option(help="Of the picture, in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the picture, in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    rounds: Annotated[int, typer.Option(help="Measured runs of each stage and side.")] = KEPT_ROUNDS,
    stages: Annotated[str, typer.Option(help="Some of them.")] = ",".join(STAGES),
    only: Annotated[str | None, typer.Option(help="zimage: leave diffusers out.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Both sides with their blocks compiled.")] = False,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="zimage's side with CUDA graphs.")] = False,
    weight_dtype: Annotated[
        str | None, typer.Option("--weight-dtype", help=f"zimage's layers in {', '.join(ROUNDED)}; diffusers' in full.")
    ] = None,
    quantize_activations: QuantizeActivations = False,
    attention: Attention = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"Folder to keep the result in; {KEPT_ROUNDS} rounds or more.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure each stage of a picture, zimage and diffusers in turn on the same weights.

    Exit code 1 if the two do not do the same work or their results differ. With --weight-dtype or attention in 8 bits
    results are reported, and only those of another picture are an error.
    """
    settings = _settings(
        size=size or (None if model else "tiny"), model=model, variant=variant, device=device, dtype=dtype,
        height=height, width=width, steps=steps, rounds=rounds, stages=_names(stages), only=only,
        compile=compile, cuda_graphs=cuda_graphs, weight_dtype=weight_dtype, quantize_activations=quantize_activations,
        attention=attention,
    )  # fmt: skip
    if output is not None and rounds < KEPT_ROUNDS:
        raise RequestError(f"a result that is kept needs {KEPT_ROUNDS} rounds or more, got {rounds}; drop --output")

    from ..bench.measure import run
    from ..bench.report import save, text

    report = run(settings, progress=shows_progress(quiet))
    print(json_format.dumps(report.to_dict()) if json else text(report))
    if rounds < KEPT_ROUNDS and not quiet:
        print(f"zimage: medians of {rounds} rounds are uncertain; the default is {KEPT_ROUNDS}", file=sys.stderr)
    if output is not None:
        print(f"zimage: kept in {save(report, output)}", file=sys.stderr)


def _settings(**options: Any) -> Settings:
    """The settings that were asked for, the model's part checked as far as its name tells."""
    settings = Settings(**{name: value for name, value in options.items() if value is not None})
    if settings.model is not None:
        from ..request import GenerationRequest

        picture = GenerationRequest(
            "", height=settings.height, width=settings.width, num_inference_steps=settings.steps, any_size=True
        )
        check_request(picture, settings.model, settings.variant)
    return settings


def _names(stages: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in stages.split(",") if name.strip())
