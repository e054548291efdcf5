"""`zimage plan`: where the parts of a model would sit in so much memory, and what a picture needs. Draws nothing."""

from __future__ import annotations

import json as json_format
from dataclasses import replace
from typing import Annotated

import typer

from ..errors import RequestError
from ..hires import demands
from ..memory.plan import Budget, Placement, Plan, gib, parse_memory
from ..memory.planner import ENCODINGS, make_plan
from ..memory.sizes import ITEMSIZE, RELEASED, ModelSizes, Work
from ..request import GenerationRequest
from .checkpoints import table
from .options import (
    MODEL_HELP,
    MODEL_VARIABLE,
    Dtype,
    Json,
    QuantizeActivations,
    Size,
    TextEncoder,
    Transformer,
    Vae,
    WeightDtype,
    check_request,
    is_released,
    read_hires,
    read_size,
)


def plan(
    model: Annotated[str, typer.Option("--model", "-m", envvar=MODEL_VARIABLE, help=MODEL_HELP)] = "turbo",
    memory: Annotated[str, typer.Option(help="Of the card: 16GB, 12GiB; or auto, what is free here.")] = "auto",
    host_memory: Annotated[
        str | None, typer.Option("--host-memory", help="Of the machine; what is free here if not given.")
    ] = None,
    size: Size = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    image: Annotated[bool, typer.Option("--image", help="Also what encoding an image to start from needs.")] = False,
    hires: Annotated[
        float | None, typer.Option("--hires", help="With a second pass so many times as large, from pixels; to 4.")
    ] = None,
    controlnet: Annotated[
        str | None,
        typer.Option(
            "--controlnet",
            help="One beside it that steers the picture: a file, a folder, or what is in the hub's cache.",
        ),
    ] = None,
    dtype: Dtype = None,
    device: Annotated[str | None, typer.Option("--device", help="cuda, mps or cpu; a card if memory is given.")] = None,
    encoding: Annotated[
        str | None,
        typer.Option("--encoding", help="Where the text encoder is: resident, streamed or cpu; chosen if not given."),
    ] = None,
    weight_dtype: WeightDtype = None,
    quantize_activations: QuantizeActivations = False,
    transformer: Transformer = None,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    json: Json = False,
) -> None:
    """Say what would sit where, and the memory that a picture would need.

    For the released models no weights need be there, and of a ControlNet only the beginning of its file is read.
    Exit code 1 if nothing fits.
    """
    precision = _dtype(dtype)
    sizes = _sizes(model, controlnet, precision, transformer=transformer, text_encoder=text_encoder, vae=vae)
    sides = read_size(size or str(sizes.native_side), None, None)
    asked = check_request(
        GenerationRequest(
            "",
            any_size=True,
            hires=read_hires(hires),
            height=sides["height"],
            width=sides["width"],
            max_sequence_length=_tokens(tokens),
        ),
        model,
        None,
    )
    height, width, length, encodes, together = demands(asked)
    work = Work(
        height=height,
        width=width,
        tokens=length,
        dtype=precision,
        from_image=image or encodes or controlnet is not None,
        together=together,
    )
    found = make_plan(
        sizes,
        work,
        _budget(memory, host_memory, device),
        text_encoder=_encoding(encoding),
        weights=weight_dtype,
        quantize_activations=quantize_activations,
    )
    if json:
        beside = {"bytes": found.sizes.adapters, "blocks": found.sizes.control_blocks}
        steered = {} if controlnet is None else {"controlnet": beside}
        print(json_format.dumps({"model": model, **steered, **found.to_dict()}))
    else:
        _print(model, found)


def _print(model: str, found: Plan) -> None:
    budget, placement = found.budget, found.placement
    host = "" if budget.host is None else f", {gib(budget.host)} of the host"
    print(f"{model}, {found.work.width}x{found.work.height}, {found.work.dtype}: {placement}")
    print(f"may be used: {gib(budget.device)} of the device{host}")
    if found.sizes.adapters:
        print(f"of it for the ControlNet: {gib(found.sizes.adapters)}, {found.sizes.control_blocks} blocks")
    if placement.slots:
        print(f"streamed through {placement.slots} places on the device, from {_sources(placement)}")
    rows = [("stage", "device", "host"), *((one.name, gib(one.device), gib(one.host)) for one in found.stages)]
    print(table(rows))
    for other in found.rejected:
        print(f"not: {other.placement}: {other.reason}")


def _sources(placement: Placement) -> str:
    """Where what is streamed comes from, as far as something is."""
    text = placement.text_source if placement.text_encoder == "streamed" else None
    blocks = None if placement.context_resident else placement.block_source
    if text and blocks and text != blocks:
        return f"{text} (text encoder) and {blocks} (blocks)"
    return str(text or blocks)


def _sizes(model: str, controlnet: str | None, dtype: str, **files: str | None) -> ModelSizes:
    """Of the model, with a ControlNet beside it in that precision; nothing is downloaded."""
    is_known = is_released(model) and not any(files.values())
    if is_known and controlnet is None:
        return RELEASED
    from ..checkpoint.sizes import local_checkpoint, sizes_of

    found = None if is_known else local_checkpoint(model, **files)
    sizes = RELEASED if found is None else sizes_of(found)
    if controlnet is None:
        return sizes
    from ..adapters.controlnet import find_controlnet, released_transformer

    config = released_transformer() if found is None else found.configs.transformer
    beside = find_controlnet(controlnet, config or {}, local_files_only=True).beside(dtype)
    return replace(sizes, adapters=beside["adapters"], control_blocks=beside["control_blocks"])


def _budget(memory: str, host_memory: str | None, device: str | None) -> Budget:
    amount = parse_memory(memory)
    host = None if host_memory is None else parse_memory(host_memory, "--host-memory")
    kind = None if device is None else device.split(":")[0]
    if kind not in (None, "cuda", "mps", "cpu"):
        raise RequestError(f"--device must be cuda, mps or cpu, got {device!r}")
    shared = kind in ("cpu", "mps")
    if amount is not None and shared:
        return Budget.of_host(amount, memory)
    if amount is not None and host is not None:
        return Budget.of_card(amount, host, memory)
    from ..memory.budget import find_budget, free_host_memory

    if amount is not None:
        return Budget.of_card(amount, free_host_memory(), memory)
    from ..runtime import choose_device

    return find_budget(memory, choose_device(device))


def _dtype(dtype: str | None) -> str:
    chosen = "bfloat16" if dtype in (None, "auto") else dtype
    if chosen not in ITEMSIZE:
        raise RequestError(f"--dtype must be auto, {', '.join(ITEMSIZE)}, got {dtype!r}")
    return str(chosen)


def _encoding(encoding: str | None) -> str | None:
    if encoding not in (None, *ENCODINGS):
        raise RequestError(f"--encoding must be {', '.join(ENCODINGS)}, got {encoding!r}")
    return encoding


def _tokens(tokens: int) -> int:
    if not 1 <= tokens <= 1504:
        raise RequestError(f"--tokens must be 1 to 1504, got {tokens}")
    return tokens
