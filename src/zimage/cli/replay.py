"""`zimage replay`: a picture made again from its file alone, and the verdict whether its bits are the same.

The file may come from anyone: of a model that it names, nothing is downloaded unless it is one of the known ones.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import AdapterError, Cancelled, CheckpointError, RequestError
from ..files.recipe import FILE_KEYS
from ..memory.planner import FULL, WITH_ACTIVATIONS
from ..memory.sizes import STORED_BYTES
from ..rules import rounds_attention
from ..variants import VARIANTS, detect_variant
from .options import (
    CacheDir,
    ControlImage,
    ControlNet,
    Device,
    Force,
    Image,
    Json,
    LocalFilesOnly,
    MaskImage,
    Memory,
    Quiet,
    TextEncoder,
    Transformer,
    Vae,
    known_variant,
    read_images,
    read_loras,
)
from .running import announce, cancel_on_interrupt, print_json, shows_progress, tell
from .targets import plan_targets, save_picture

if TYPE_CHECKING:
    from ..files.recipe import Recipe
    from ..pipeline import ZImagePipeline

_DTYPES = ("bfloat16", "float16", "float32")
_MAX_THREADS = 256


def replay(
    file: Annotated[Path, typer.Argument(help="A PNG with a recipe.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the picture to this file too.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Use this model, not the one recorded.")] = None,
    transformer: Transformer = None,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    image: Image = None,
    mask_image: MaskImage = None,
    control_image: ControlImage = None,
    controlnet: ControlNet = None,
    device: Device = None,
    memory: Memory = None,
    loras: Annotated[
        list[str] | None, typer.Option("--lora", help="NAME=SOURCE: take that adapter from there, not where it was.")
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Make a picture again from its file.

    Says whether it has the same bits (exit code 0) or not (1), and then what is not as it was.
    """
    from ..files.png import read_recipe
    from ..files.relayed import require_one_model

    recipe = read_recipe(file)
    require_one_model(recipe)
    edited = _is_edited(file, recipe)
    if recipe.given:
        raise RequestError(f"{file} was made from {', '.join(recipe.given)}, which the file does not hold")
    images = read_images(image, mask_image, control_image)
    asked = recipe.with_images(**images)
    if output is not None and output.is_dir():
        output = output / file.name
    if output is not None:
        plan_targets(output, 1, overwrite=force)
    given = _by_name(loras, recipe)
    files = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    pipe = _load(
        recipe, model, files, device, memory=memory or "auto", cache_dir=cache_dir, local_files_only=local_files_only
    )
    if model:
        _require_variant(recipe, model, pipe.shift)
    _set_attention(pipe, recipe)
    _load_adapters(pipe, recipe, given, cache_dir=cache_dir, local_files_only=local_files_only)
    _load_controlnet(pipe, recipe, controlnet, cache_dir=cache_dir, local_files_only=local_files_only)
    request = pipe.resolve(asked)
    start = perf_counter()
    with cancel_on_interrupt() as cancel:
        if not quiet:
            announce(pipe, [request])
        try:
            result = pipe.replay(recipe, **images, cancel=cancel, progress=shows_progress(quiet))
            seconds = perf_counter() - start
            if output is not None:
                save_picture(result.image, output, overwrite=force)
        except (Cancelled, KeyboardInterrupt):
            raise Cancelled("cancelled, nothing written") from None
    if not quiet and pipe.plan is not None:
        tell(pipe.plan.stepped_down)
    found = [f"the picture in {file} was changed after it was made"] * edited + list(result.differences)
    same = result.same_bits and not edited
    if json:
        verdict = {"output": None if output is None else str(output), "same_bits": same, "differences": found}
        print_json(
            result.image.recipe or pipe.recipe(result.request, result.image), seconds=seconds, file=str(file), **verdict
        )
    else:
        _print_verdict(same, found, output)
    if not same:
        raise typer.Exit(1)


def _load(
    recipe: Recipe,
    model: str | None,
    files: Mapping[str, str | None],
    device: str | None,
    *,
    memory: str,
    cache_dir: Path | None,
    local_files_only: bool,
) -> ZImagePipeline:
    """The model that the recipe was made with, or `model`, with the files that it has or those that were given, placed
    as it was then as far as this machine can."""
    source = model or recipe.model["source"]
    if not source:
        raise RequestError("the file does not say which model it was made with; pass --model")
    recorded_files = {one: recipe.model[one] for one in FILE_KEYS if recipe.model[one] and not (model or files[one])}
    for name in [] if model else [source, *recorded_files.values()]:
        if name.startswith(("\\\\", "//")):
            raise RequestError(f"the file names a model on another machine, {name}; pass --model if that is right")
    if model:
        _require_variant(recipe, model)
    released = any(source == variant.hub_id for variant in VARIANTS.values())
    trusted = bool(model) or (released and not recorded_files)
    recorded = recipe.model["revision"]
    revision = recorded if not model and re.fullmatch(r"[0-9a-f]{40}", recorded) else None
    dtype, weights = recipe.runtime.get("dtype", ""), recipe.runtime.get("weights", "")
    _use_threads(recipe)

    from .. import ZImagePipeline

    try:
        return ZImagePipeline.from_pretrained(
            source,
            transformer=files["transformer"] or recorded_files.get("transformer"),
            text_encoder=files["text_encoder"] or recorded_files.get("text_encoder"),
            vae=files["vae"] or recorded_files.get("vae"),
            variant=recipe.request.variant,
            dtype=dtype if dtype in _DTYPES else None,
            device=device or ("cpu" if recipe.runtime.get("device") == "cpu" else None),
            memory=memory,
            weight_dtype=weights if weights in (FULL, *STORED_BYTES) else None,
            quantize_activations=weights in WITH_ACTIVATIONS and recipe.runtime.get("activations") == weights,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only or not trusted,
        )
    except CheckpointError as error:
        if trusted or local_files_only:
            raise
        ask = "".join(f", --{part.replace('_', '-')}" for part in recorded_files)
        raise CheckpointError(f"{error}; the file names this model: pass --model{ask} to download it") from None


def _require_variant(recipe: Recipe, source: str, shift: float | None = None) -> None:
    """Raises `RequestError` for a model of the other variant, as far as its name tells, or the schedule in its folder,
    or `shift`. One that was said to be a variant though its schedule is the other's may be so again."""
    found = None
    with suppress(CheckpointError, OSError, RuntimeError, ValueError):  # which loading tells better
        found = known_variant(source, None)
        if found is None and shift is None:
            from ..checkpoint.inspect import inspect_checkpoint

            found = VARIANTS.get(inspect_checkpoint(Path(source).expanduser()).variant or "")
        elif found is None:
            found = detect_variant(variant=None, hub_id=None, shift=shift)
    wanted = recipe.request
    if found is not None and found.name != wanted.variant and found.shift != wanted.shift:
        raise RequestError(
            f"the picture was made by a {wanted.variant} model, and {source} is a {found.name} model; pass a "
            f"{wanted.variant} model as --model"
        )


def _set_attention(pipe: ZImagePipeline, recipe: Recipe) -> None:
    """Attention in 8 bits where the recipe has it and this machine too; elsewhere the replay names the difference."""
    backend = recipe.runtime.get("attention", "")
    if rounds_attention(backend):
        with suppress(RequestError):
            pipe.set_attention_backend(backend)


def _by_name(loras: list[str] | None, recipe: Recipe) -> dict[str, str]:
    """The sources of adapters that were given, by the names that the recipe has for them."""
    given: dict[str, str] = {}
    for lora in read_loras(loras):
        if lora.name is None or lora.name not in recipe.adapters or lora.strength is not None:
            known = ", ".join(recipe.adapters) or "none"
            raise RequestError(
                f"--lora here is NAME=SOURCE, of an adapter that the file names ({known}); got {lora.source}"
            )
        given[lora.name] = lora.source
    return given


def _load_adapters(
    pipe: ZImagePipeline, recipe: Recipe, given: dict[str, str], *, cache_dir: Path | None, local_files_only: bool
) -> None:
    """The adapters of the recipe; what is not given must be on this machine."""
    for name, said in recipe.adapters.items():
        source = given.get(name, said["source"])
        if name not in given and source.startswith(("\\\\", "//")):
            raise RequestError(f"the file names an adapter on another machine, {source}; pass --lora if that is right")
        try:
            pipe.load_adapter(
                source,
                name,
                strength=0.0,
                cache_dir=cache_dir,
                local_files_only=local_files_only or name not in given,
            )
        except AdapterError as error:
            if name in given:
                raise
            option = shlex.quote(f"{name}=SOURCE")
            raise AdapterError(f"{error}; the file names this adapter: pass --lora {option}") from None


def _load_controlnet(
    pipe: ZImagePipeline, recipe: Recipe, given: str | None, *, cache_dir: Path | None, local_files_only: bool
) -> None:
    """The ControlNet of the recipe; where it is not given it must be on this machine."""
    if given is not None and not recipe.controlnet:
        raise RequestError("the picture was made without a ControlNet; leave --controlnet out")
    source = given or recipe.controlnet.get("source")
    if source is None:
        return
    if given is None and source.startswith(("\\\\", "//")):
        raise RequestError(
            f"the file names a ControlNet on another machine, {source}; pass --controlnet if it is right"
        )
    try:
        pipe.load_controlnet(source, cache_dir=cache_dir, local_files_only=local_files_only or given is None)
    except AdapterError as error:
        if given is not None:
            raise
        raise AdapterError(f"{error}; the file names this ControlNet: pass --controlnet SOURCE") from None


def _use_threads(recipe: Recipe) -> None:
    """Compute with as many CPU threads as then: sums are split by thread, so the bits depend on it."""
    threads = recipe.runtime.get("threads", "")
    if re.fullmatch(r"[0-9]{1,3}", threads) and 1 <= int(threads) <= _MAX_THREADS:
        import torch

        torch.set_num_threads(int(threads))


def _is_edited(file: Path, recipe: Recipe) -> bool:
    """Whether another program changed the picture and left the recipe in the file."""
    from PIL import Image

    from ..files.recipe import pixel_digest

    with Image.open(file) as image:
        return pixel_digest(image) != recipe.pixels


def _print_verdict(same: bool, found: list[str], output: Path | None) -> None:
    if output is not None:
        print(output)
    print("same bits" if same else "not the same bits")
    for sentence in found:
        print(f"  {sentence}")
    if not same and not found:
        print("  nothing that the recipe records is different")
