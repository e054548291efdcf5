"""`zimage generate`: from the options of the command line to pictures on disk.

Translates and wires; rules about options are the library's, and so are defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Cancelled, RequestError
from ..request import ResolvedRequest, expand_requests
from .options import (
    MODEL_HELP,
    MODEL_VARIABLE,
    Attention,
    CacheDir,
    ControlImage,
    ControlNet,
    Device,
    Dtype,
    Force,
    Image,
    Json,
    LocalFilesOnly,
    Lora,
    MaskImage,
    Memory,
    QuantizeActivations,
    Quiet,
    Size,
    TextEncoder,
    Transformer,
    Vae,
    WeightDtype,
    check_request,
    choose_model,
    read_hires,
    read_images,
    read_loras,
    read_normalization,
    read_padding,
    read_size,
)
from .prompts import prompts_of
from .running import announce, cancel_on_interrupt, print_json, shows_progress, tell
from .targets import Targets, plan_targets

if TYPE_CHECKING:
    from .. import Drawn
    from ..pipeline import ZImagePipeline


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text; - or nothing reads stdin.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Instead: a file with a prompt on each line.")] = None,
    expand: Annotated[
        bool, typer.Option("--expand", help="Draw all that templates stand for: a {red|blue} fox, a red __animal__.")
    ] = False,
    pick: Annotated[int | None, typer.Option(help="Draw so many of those instead, at random by the seed.")] = None,
    wildcards: Annotated[Path | None, typer.Option(help="Folder of lists: animal.txt is __animal__.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", envvar=MODEL_VARIABLE, help=f"{MODEL_HELP} Or a transformer's file, with --variant."
        ),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="base or turbo, where the model does not tell.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative", "--negative-prompt", help="What to steer away from (base).")
    ] = None,
    size: Size = None,
    height: Annotated[int | None, typer.Option(hidden=True)] = None,
    width: Annotated[int | None, typer.Option(hidden=True)] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option("--steps", "--num-inference-steps", help="Denoising steps.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance", "--guidance-scale", help="0 is off; ComfyUI's cfg is 1 more.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Drawn if not given; picture k has seed + k.")] = None,
    num_images_per_prompt: Annotated[
        int | None, typer.Option("--count", "-n", "--num-images-per-prompt", help="How many pictures.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File or folder; zimage-<seed>.png if not given.")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    memory: Memory = None,
    weight_dtype: WeightDtype = None,
    quantize_activations: QuantizeActivations = False,
    attention_backend: Attention = None,
    transformer: Transformer = None,
    text_encoder: TextEncoder = None,
    vae: Vae = None,
    sampler: Annotated[str | None, typer.Option(help="euler, heun or dpmpp_2m.")] = None,
    cache: Annotated[str | None, typer.Option(help="balanced: predict about half of the steps (base).")] = None,
    cfg_normalization: Annotated[str | None, typer.Option(help="true, false, or a cap on the guided norm.")] = None,
    cfg_truncation: Annotated[float | None, typer.Option(help="No guidance once 1 - sigma exceeds this.")] = None,
    image: Image = None,
    mask_image: MaskImage = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of the image may change, to 1; 0.6, or 1 with a mask or padding.")
    ] = None,
    keep_steps: Annotated[bool, typer.Option("--keep-steps", help="Take all steps at any strength.")] = False,
    padding: Annotated[
        str | None, typer.Option(help="Paint around the image: left,top,right,bottom in pixels, or one for all.")
    ] = None,
    control_image: ControlImage = None,
    controlnet: ControlNet = None,
    controlnet_conditioning_scale: Annotated[
        float | None,
        typer.Option("--control-scale", "--controlnet-conditioning-scale", help="How much of it is added; 0.75, to 2."),
    ] = None,
    max_sequence_length: Annotated[int | None, typer.Option(help="Tokens of the prompt that are kept.")] = None,
    adapters: Lora = None,
    diversity: Annotated[
        float | None, typer.Option(help="Let pictures differ more from seed to seed; 1 to 2 for Turbo, 0 is off.")
    ] = None,
    hires: Annotated[
        float | None, typer.Option("--hires", help="Make it so many times as large in a second pass, to 4.")
    ] = None,
    hires_strength: Annotated[
        float | None, typer.Option("--hires-strength", help="How much of the steps that pass takes; 0.4, to 1.")
    ] = None,
    hires_upscale: Annotated[
        str | None, typer.Option("--hires-upscale", help="What is enlarged for it: pixels, or latents.")
    ] = None,
    any_size: Annotated[bool, typer.Option("--any-size", help="Accept areas the models are not made for.")] = False,
    no_recipe: Annotated[bool, typer.Option("--no-recipe", help="Write no recipe into the files.")] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalFilesOnly = False,
) -> None:
    """Draw pictures; print the files they are written to."""
    choice = choose_model(model, variant=variant, revision=revision, cache_dir=cache_dir)
    options = _given(
        negative_prompt=negative_prompt,
        num_images_per_prompt=num_images_per_prompt,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        cache=cache,
        cfg_normalization=read_normalization(cfg_normalization),
        cfg_truncation=cfg_truncation,
        max_sequence_length=max_sequence_length,
        diversity=diversity,
        hires=read_hires(hires, strength=hires_strength, upscale=hires_upscale),
        any_size=any_size or None,
        **read_images(image, mask_image, control_image),
        controlnet_conditioning_scale=controlnet_conditioning_scale,
        strength=strength,
        keep_steps=keep_steps or None,
        padding=read_padding(padding),
        **read_size(size, height, width),
    )
    texts = prompts_of(prompt, file=prompts, expands=expand, number=pick, wildcards=wildcards, seed=seed)
    requests = expand_requests(texts, **options)
    check_request(requests[0], choice.model, variant)
    targets = plan_targets(output, len(requests), overwrite=force)
    loras = read_loras(adapters)
    if control_image is not None and controlnet is None:
        raise RequestError("--control-image needs a ControlNet; name one with --controlnet, or leave it out")
    if controlnet is not None and control_image is None:
        raise RequestError("--controlnet follows a --control-image; pass --control-image, or leave --controlnet out")

    if choice.notice:
        print(f"zimage: {choice.notice}", file=sys.stderr)

    from .. import ZImagePipeline

    place = _given(
        variant=variant,
        dtype=dtype,
        device=device,
        memory=memory,
        weight_dtype=weight_dtype,
        quantize_activations=quantize_activations or None,
        attention_backend=attention_backend,
        transformer=transformer,
        text_encoder=text_encoder,
        vae=vae,
        revision=revision,
        cache_dir=cache_dir,
    )
    offline = local_files_only or choice.is_there
    pipe = ZImagePipeline.from_pretrained(choice.model, local_files_only=offline, **place)
    for lora in loras:
        more = _given(strength=lora.strength, cache_dir=cache_dir)
        pipe.load_adapter(lora.source, lora.name, local_files_only=local_files_only, **more)
    if controlnet is not None:
        pipe.load_controlnet(controlnet, cache_dir=cache_dir, local_files_only=local_files_only)
    resolved = [pipe.resolve(request) for request in requests]
    _draw(pipe, resolved, targets, json=json, quiet=quiet, embed_recipe=not no_recipe)


def _draw(
    pipe: ZImagePipeline,
    requests: Sequence[ResolvedRequest],
    targets: Targets,
    *,
    json: bool,
    quiet: bool,
    embed_recipe: bool,
) -> None:
    """Draw one picture after the other and write each when it is done, beside the next, so that Ctrl-C loses one."""
    progress, writing = shows_progress(quiet), list[Future[None]]()
    write = partial(_write, pipe, targets, json=json, quiet=quiet)
    with cancel_on_interrupt() as cancel, ThreadPoolExecutor(1, thread_name_prefix="zimage-files") as thread:
        if not quiet:
            announce(pipe, requests)
        drawing = pipe.generate_many(requests, cancel=cancel, progress=progress, embed_recipe=embed_recipe)
        start = perf_counter()
        try:
            with closing(drawing):
                for drawn in drawing:
                    seconds, start = perf_counter() - start, perf_counter()
                    _wait(writing)
                    writing.append(thread.submit(write, drawn, seconds))
                    writing[-1].add_done_callback(partial(_stop_if_failed, cancel))
            _wait(writing)
        except (Cancelled, KeyboardInterrupt):
            _wait(writing)
            written = f"{len(writing)} of {len(requests)} pictures" if writing else "nothing"
            raise Cancelled(f"cancelled, {written} written") from None


def _write(pipe: ZImagePipeline, targets: Targets, drawn: Drawn, seconds: float, *, json: bool, quiet: bool) -> None:
    """Write one picture and say so; `seconds` have passed since the one before was drawn."""
    file = targets.save(drawn.image, drawn.index, drawn.request.seed)
    if not quiet:
        tell(drawn.stepped_down)
    if json:
        recipe = drawn.image.recipe or pipe.recipe(drawn.request, drawn.image)
        print_json(recipe, file=str(file), seconds=seconds)
    else:
        print(file, flush=True)


def _wait(writing: Sequence[Future[None]]) -> None:
    """Until all is written that was begun; raises what went wrong."""
    if writing:
        writing[-1].result()  # those before it are done


def _stop_if_failed(cancel: Event, writing: Future[None]) -> None:
    """Draw no more if a picture could not be written."""
    if writing.exception() is not None:
        cancel.set()


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
