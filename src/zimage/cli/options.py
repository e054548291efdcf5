"""What several commands take: the options that choose and place a model, and how texts on the command line are read.

Defaults are not here: an option that is not given is `None` and is not passed on.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import typer

from ..editing import SourceImage
from ..errors import RequestError
from ..hires import Hires
from ..request import GenerationRequest, ResolvedRequest
from ..rules import is_unicode
from ..variants import DEMOS, VARIANTS, Variant, detect_variant, get_variant

MODEL_VARIABLE = "ZIMAGE_MODEL"
MODEL_HELP = f"{', '.join([*VARIANTS, *DEMOS])}, a hub id or a folder."
MAX_PROMPT_BYTES = 2**20


@dataclass
class State:
    """What the command line as a whole was told; `options` has the option of each parameter of the command called."""

    debug: bool = False
    options: dict[str, str] = field(default_factory=dict)


def _sides_by_size(context: typer.Context, size: str | None) -> str | None:
    """Where `--size` is given, what is said of a picture's sides is said of it."""
    if size is not None and isinstance(context.obj, State):
        context.obj.options |= {"height": "--size", "width": "--size"}
    return size


Size = Annotated[
    str | None,
    typer.Option("--size", help="1280x720 (width x height), or one number for a square.", callback=_sides_by_size),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")]
Device = Annotated[str | None, typer.Option("--device", help="cuda, cuda:1, mps or cpu; the best if not given.")]
Memory = Annotated[str | None, typer.Option("--memory", help="Of the device, at most: 16GB, 12GiB; or auto.")]
WeightDtype = Annotated[
    str | None, typer.Option("--weight-dtype", help="What weights are stored as: full, bfloat16, int8, float8 or nf4.")
]
QuantizeActivations = Annotated[
    bool,
    typer.Option("--quantize-activations", help="With weights in int8 or float8: multiply in 8 bits on both sides."),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention", "--attention-backend", help="auto, fastest, float8 (8 bits, on Hopper), or diffusers'."
    ),
]
Transformer = Annotated[
    str | None,
    typer.Option("--transformer", help="Its weights: a GGUF or safetensors file, here or owner/name/file on the hub."),
]
TextEncoder = Annotated[str | None, typer.Option("--text-encoder", help="The same of the text encoder, a Qwen3-4B.")]
Vae = Annotated[str | None, typer.Option("--vae", help="The same of the VAE.")]
Image = Annotated[Path | None, typer.Option("--image", help="What the picture starts from.")]
MaskImage = Annotated[
    Path | None,
    typer.Option("--mask", "--mask-image", help="White where the image is repainted, black where it stays."),
]
ControlNet = Annotated[
    str | None,
    typer.Option("--controlnet", help="What --control-image acts through: a file, a folder, or one on the hub."),
]
ControlImage = Annotated[
    Path | None, typer.Option("--control-image", help="Edges, depth or a pose that the picture follows.")
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        "--adapters",
        help="[NAME=]SOURCE[:STRENGTH]: a file, a folder, or owner/name/file on the hub. Repeat it for several.",
    ),
]
CacheDir = Annotated[Path | None, typer.Option("--cache-dir", help="Folder for downloads, not the hub's cache.")]
LocalFilesOnly = Annotated[bool, typer.Option("--local-files-only", help="Download nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output file if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No line about the recipe and no progress bar.")]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The model that draws; where it was not named, what to tell the user, and that nothing need be downloaded."""

    model: str
    notice: str = ""

    @property
    def is_there(self) -> bool:
        """Whether it was chosen because all of it is on this machine."""
        return bool(self.notice)


def choose_model(
    model: str | None, *, variant: str | None = None, revision: str | None = None, cache_dir: Path | None = None
) -> Choice:
    """The model that was asked for, else a released one that is in the cache, else a demo; of `variant` if it is given.

    Raises `RequestError` for a revision of no model, and a variant that there is not.
    """
    if model:
        return Choice(model=model)
    if revision is not None:
        raise RequestError(f"--revision is of a model on the hub: name it with --model ({' or '.join(VARIANTS)})")
    from ..checkpoint.locate import is_cached

    wanted = list(VARIANTS.values()) if variant is None else [get_variant(variant)]
    for known in sorted(wanted, key=lambda known: known.evaluations):
        if is_cached(known.hub_id, cache_dir):
            return Choice(model=known.name, notice=f"no model was named: {known.name}, which is in the cache")
    names = " or ".join(known.name for known in wanted)
    demo = next(name for name, of in DEMOS.items() if VARIANTS[of] in wanted)
    return Choice(
        model=demo,
        notice=f"no model was named and no whole one is in the cache: {demo}, a small one that knows coloured shapes "
        f"only; --model {names} downloads a real one (about 20 GB)",
    )


def is_released(model: str) -> bool:
    """Whether `model` is the alias or the hub id of a released model."""
    return model in VARIANTS or any(known.hub_id == model for known in VARIANTS.values())


def known_variant(model: str, variant: str | None) -> Variant | None:
    """The variant of a model, as far as names tell before it is loaded; errors as in `detect_variant`."""
    if variant is None and model in DEMOS:
        return VARIANTS[DEMOS[model]]
    if variant is None and not is_released(model):
        return None
    hub_id = VARIANTS[model].hub_id if model in VARIANTS else model
    return detect_variant(variant=variant, hub_id=hub_id, shift=None)


def check_request(request: GenerationRequest, model: str, variant: str | None) -> ResolvedRequest:
    """A request as the model, as far as its name tells, will resolve it; raises `RequestError` where it will refuse.

    Where the variant is not known, that is one which every variant refuses. Sizes are known of the released models.
    """
    known = known_variant(model, variant)
    candidates = [known] if known else list(VARIANTS.values())
    if not is_released(model):
        request = replace(request, any_size=True)
    errors = []
    for candidate in candidates:
        try:
            return request.resolve(candidate)
        except RequestError as error:
            errors.append(error)
    raise errors[0]


def read_prompt(prompt: str | None) -> str:
    """The prompt given, or what stdin holds where it is `-`, or absent with stdin piped."""
    if prompt not in (None, "-"):
        return _unicode(prompt or "")
    if prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise RequestError("no prompt: pass one in quotes, or pipe it in")
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise RequestError(f"the prompt on stdin is longer than {MAX_PROMPT_BYTES} bytes")
    text = _unicode(data.decode("utf-8", "surrogateescape")).strip("\ufeff\r\n")
    if not text.strip():
        raise RequestError("no prompt: stdin is empty; for a picture without a prompt pass ''")
    return text


def read_size(size: str | None, height: int | None, width: int | None) -> dict[str, int]:
    """`height` and `width` as far as they were given, by `1280x720` (width x height), `1024` or their own options."""
    if size is None:
        return {name: side for name, side in (("height", height), ("width", width)) if side is not None}
    if height is not None or width is not None:
        raise RequestError("--size gives width and height; leave --height and --width out")
    match = re.fullmatch(r"\s*(\d{1,6})(?:\s*[xX×]\s*(\d{1,6}))?\s*", size, re.ASCII)
    if match is None:
        raise RequestError(f"--size must be WIDTHxHEIGHT like 1280x720, or one number for a square, got {size!r}")
    return {"width": int(match[1]), "height": int(match[2] or match[1])}


def read_normalization(text: str | None) -> float | bool | None:
    """`cfg_normalization`, which is true, false or a number."""
    words = {"true": True, "false": False}
    if text is None or text.lower() in words:
        return None if text is None else words[text.lower()]
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"--cfg-normalization must be true, false or a number, got {text!r}") from None


def read_padding(text: str | None) -> list[int] | None:
    """`padding` of "64,0,64,0" (left, top, right, bottom), or of one number for all sides."""
    if text is None:
        return None
    parts = re.findall(r"\d{1,6}", text, re.ASCII)
    if not re.fullmatch(r"\s*\d{1,6}\s*(?:,\s*\d{1,6}\s*){0,3}", text, re.ASCII) or len(parts) not in (1, 4):
        raise RequestError(f"--padding must be left,top,right,bottom like 64,0,64,0, or one number; got {text!r}")
    return [int(part) for part in parts] * (4 // len(parts))


def read_images(
    image: Path | None, mask_image: Path | None, control_image: Path | None = None
) -> dict[str, SourceImage]:
    """A request's images by their names in it, as far as they were given, read before any model is loaded."""
    given = {"image": image, "mask_image": mask_image, "control_image": control_image}
    if not any(given.values()):
        return {}
    from ..files.images import READERS

    return {name: READERS[name](path) for name, path in given.items() if path is not None}


@dataclass(frozen=True, kw_only=True)
class LoraChoice:
    """A LoRA as it was asked for on the command line."""

    source: str
    name: str | None
    strength: float | None


def read_loras(texts: Sequence[str] | None) -> list[LoraChoice]:
    """What each `--lora` says: `ink.safetensors`, `ink.safetensors:0.8`, `wash=ink.safetensors:0.8`."""
    choices = []
    for text in texts or ():
        match = re.fullmatch(r"(?:([^=/\\:]{1,64})=)?(.+?)(?::([-+]?(?:\d{1,6}\.?\d{0,9}|\.\d{1,9})))?", text)
        if match is None:
            raise RequestError(f"--lora must be [NAME=]SOURCE[:STRENGTH] like ink.safetensors:0.8, got {text!r}")
        strength = None if match[3] is None else float(match[3])
        choices.append(LoraChoice(source=match[2], name=match[1], strength=strength))
    return choices


def _unicode(text: str) -> str:
    if not is_unicode(text):
        raise RequestError("the prompt is not valid UTF-8")
    return text


def read_hires(scale: float | None, **how: float | str | None) -> Hires | None:
    """`--hires` and what goes with it; raises `RequestError` for how, but not how large."""
    given = {name: value for name, value in how.items() if value is not None}
    if scale is None:
        if given:
            raise RequestError(f"--hires-{next(iter(given))} is about a second pass; add --hires 2, or leave it out")
        return None
    return Hires(scale, **given)  # type: ignore[arg-type]
