"""`zimage convert`: a checkpoint in another layout. Translates and prints; `checkpoint.convert` does it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import MODEL_HELP, CacheDir, LocalFilesOnly, Quiet, TextEncoder, Transformer, Vae


def convert(
    model: Annotated[str, typer.Argument(help=f"{MODEL_HELP} Or a transformer's file, with --variant.")],
    target: Annotated[
        Path, typer.Argument(help="x.safetensors (for ComfyUI), x.gguf, or a folder (for zimage and diffusers).")
    ],
    part: Annotated[
        str | None, typer.Option(help="What a .safetensors file gets: transformer (if not given), text_encoder or vae.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16, float32, float8 (.safetensors) or q8_0 (.gguf); as it is if not given."),
    ] = None,
    transformer: Transformer = None,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    variant: Annotated[str | None, typer.Option(help="base or turbo, where the model does not tell.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of the files in a folder.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace the file or checkpoint folder if it exists.")] = False,
    quiet: Quiet = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Write a model in another layout, tensor by tensor; print what is written.

    A single file holds one part and needs the weights of that alone.
    """
    from ..checkpoint.convert import convert_checkpoint

    def tell(sentence: str) -> None:
        if not quiet:
            print(f"zimage: {sentence}", file=sys.stderr, flush=True)

    print(
        convert_checkpoint(
            model,
            target,
            part=part,
            dtype=dtype,
            transformer=transformer,
            text_encoder=text_encoder,
            vae=vae,
            variant=variant,
            overwrite=force,
            max_shard_size=max_shard_size,
            report=tell,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    )
