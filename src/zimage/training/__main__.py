"""`python -m zimage.training STAGE FOLDER`: the stages of training, one command each, all in one folder.

Reads the command line and starts a stage; what a stage does and its numbers stand in the modules of their names and in
`config`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import RequestError, ZImageError
from ..request import GenerationRequest
from .config import FlowStage, Stage, Training

AnyStage = TypeVar("AnyStage", bound=Stage)
VAE, FLOW, TURBO = "autoencoder", "flow", "turbo"
"""Folders of runs within the folder of a training."""


def tokenizer(options: argparse.Namespace) -> None:
    """Learn the tokenizer from captions."""
    from .tokenizer import make_tokenizer

    make_tokenizer(Training().size, options.folder / "tokenizer", seed=options.seed)


def prepare(options: argparse.Namespace) -> None:
    """Take tokenizer and autoencoder from `--model`, instead of the two stages that train them."""
    from ..checkpoint.locate import locate

    source = locate(options.model or "demo").folder
    shutil.copytree(source / "tokenizer", options.folder / "tokenizer")
    shutil.copytree(source / "vae", options.folder / VAE / "vae")


def autoencoder(options: argparse.Namespace) -> None:
    """Train the autoencoder."""
    from .autoencoder import train_autoencoder

    training = Training()
    stage = _changed(training.autoencoder, options)
    train_autoencoder(stage, training.size, options.folder / VAE, **_course(options))


def latents(options: argparse.Namespace) -> None:
    """Encode the scenes that the flow learns from."""
    from diffusers import AutoencoderKL

    from .latents import store_latents

    vae = AutoencoderKL.from_pretrained(options.folder / VAE / "vae").eval()
    store_latents(vae, options.folder, FlowStage().scenes, seed=options.seed)


def flow(options: argparse.Namespace) -> None:
    """Train text encoder and transformer, or finish those of `--model`."""
    from .flow import train_flow

    training = Training()
    train_flow(
        _changed(training.finishing if options.model else training.flow, options),
        training.size,
        options.folder / FLOW,
        data=options.folder,
        initial=options.model,
        compiled=options.compile,
        **_course(options),
    )


def gather(options: argparse.Namespace) -> None:
    """Find what the turbo of `--model` draws wrong and its teacher right, for `distill --correct`."""
    from .gathering import gather

    stage = Training().correction
    gather(
        stage,
        _teacher(options),
        options.model or "demo-turbo",
        options.folder,
        count=options.count or stage.gathered,
        seed=options.seed,
        resume=options.resume,
        compiled=options.compile,
    )


def distill(options: argparse.Namespace) -> None:
    """Distil the flow's average, or the model of `--teacher`, into a turbo, or correct the one of `--model`."""
    from .distill import train_turbo

    training = Training()
    train_turbo(
        _changed(training.correction if options.correct else training.distillation, options),
        _teacher(options),
        options.folder / TURBO,
        data=options.folder,
        initial=options.model,
        compiled=options.compile,
        **_course(options),
    )


def evaluate(options: argparse.Namespace) -> None:
    """Print how often a model draws what it is told: the one in training, or that of `--model`."""
    from .evaluate import Recipe, evaluate

    pipe = _pipeline(options)
    steps, sampler, guidance = options.sampling_steps, options.sampler, options.guidance
    asked = pipe.resolve(
        GenerationRequest("", num_inference_steps=steps, sampler=sampler, guidance_scale=guidance, seed=0)
    )
    steps, sampler, guidance = asked.num_inference_steps, asked.sampler, asked.guidance_scale
    recipe = Recipe.of(pipe, steps=steps, sampler=sampler, guidance_scale=guidance)
    right = evaluate(pipe, options.count or 50, options.seed, recipe)
    print(json.dumps({"steps": steps, "sampler": sampler, "guidance": guidance, **right}))


def export(options: argparse.Namespace) -> None:
    """Write the averaged model as a checkpoint in the hub's layout."""
    target = options.folder / ("demo-turbo" if options.variant == "turbo" else "demo")
    pipe = _pipeline(options)
    shutil.rmtree(target, ignore_errors=True)
    pipe.save_pretrained(target)
    print(target, sum(file.stat().st_size for file in target.rglob("*") if file.is_file()), "bytes")


RUNS = ("autoencoder", "flow", "distill")
STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    stage.__name__: stage
    for stage in (tokenizer, autoencoder, prepare, latents, flow, distill, gather, evaluate, export)
}
ALL = tuple(STAGES)
OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "seed": (ALL, {"type": int, "default": 0, "help": "of everything that is drawn"}),
    "resume": ((*RUNS, "gather"), {"action": "store_true", "help": "go on from the saved state"}),
    "until": (RUNS, {"type": int, "help": "stop after this step, to go on later with --resume"}),
    "steps": (RUNS, {"type": int, "help": "steps of the whole run"}),
    "batch": (RUNS, {"type": int, "help": "pictures of a step"}),
    "correct": (("distill",), {"action": "store_true", "help": "learn from what `gather` found, and less from scenes"}),
    "compile": (
        ("flow", "distill", "gather"),
        {"action": "store_true", "help": "compile the blocks; needs a C++ compiler"},
    ),
    "model": (
        ("prepare", "flow", "distill", "gather", "evaluate"),
        {"help": "a checkpoint to start from or to measure, instead of what was trained in the folder"},
    ),
    "teacher": (
        ("distill", "gather", "evaluate", "export"),
        {"help": "a checkpoint whose turbo this is, instead of the model that was trained in the folder"},
    ),
    "between": (
        ("evaluate", "export"),
        {"help": "with --variant turbo, a checkpoint: the model half way from its weights to the folder's"},
    ),
    "variant": (("evaluate", "export"), {"choices": ("base", "turbo"), "help": "of the folder's two; base"}),
    "count": (("gather", "evaluate"), {"type": int, "help": "corrections; captions of each kind and language, 50"}),
    "sampling-steps": (("evaluate",), {"type": int, "help": "denoising steps; as the recipe has it"}),
    "sampler": (("evaluate",), {"help": "euler, heun or dpmpp_2m; as the recipe has it"}),
    "guidance": (("evaluate",), {"type": float, "help": "guidance scale; as the recipe has it"}),
}
"""The stages that take each option, and what argparse is told of it."""


def main() -> None:
    """Run the stage that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m zimage.training", description="Train small Z-Image models.")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, stage in STAGES.items():
        command = stages.add_parser(name, help=stage.__doc__, description=stage.__doc__)
        command.add_argument("folder", type=Path, help="of the training; stages find each other's results there")
        for option, (takers, how) in OPTIONS.items():
            if name in takers:
                command.add_argument(f"--{option}", **how)
    options = parser.parse_args()
    try:
        STAGES[options.stage](options)
    except (ZImageError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")


def _changed(stage: AnyStage, options: argparse.Namespace) -> AnyStage:
    given = {name: getattr(options, name) for name in ("steps", "batch") if getattr(options, name) is not None}
    assert given.keys() <= {field.name for field in fields(stage)}
    return replace(stage, **given)


def _course(options: argparse.Namespace) -> dict[str, Any]:
    """How far a run goes, and from where."""
    return {"seed": options.seed, "resume": options.resume, "until": options.until}


def _teacher(options: argparse.Namespace) -> Any:
    """The model that a turbo is distilled from, with its text encoder."""
    from .models import Painter
    from .state import average_of, fill

    painter = Painter(Training().size)
    if options.teacher:
        from ..pipeline import ZImagePipeline

        painter.take(ZImagePipeline.from_pretrained(options.teacher, dtype="float32", device="cpu"))
    else:
        fill(painter, average_of(options.folder / FLOW), f"the run in {options.folder / FLOW}")
    return painter


def _pipeline(options: argparse.Namespace) -> Any:
    from ..pipeline import ZImagePipeline

    if options.between and options.variant != "turbo":
        raise RequestError("--between is of two turbos: the one that it names and the folder's; add --variant turbo")
    if getattr(options, "model", None):
        if options.variant:
            raise RequestError("--variant chooses between the folder's two models and --model names one; drop one")
        return ZImagePipeline.from_pretrained(options.model, device="cpu")
    from .models import make_pipeline
    from .state import average_of, between, fill

    painter = _teacher(options)
    if options.variant == "turbo":
        turbo = options.folder / TURBO
        weights = average_of(turbo)
        if options.between:
            earlier = ZImagePipeline.from_pretrained(options.between, dtype="float32", device="cpu")
            weights = between(earlier.transformer.state_dict(), weights)
        fill(painter.transformer, weights, f"the run in {turbo}")
    vae = options.folder / VAE / "vae"
    return make_pipeline(painter, options.folder / "tokenizer", vae, variant=options.variant or "base")


if __name__ == "__main__":
    main()
