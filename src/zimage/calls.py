"""From the arguments of one call to its resolved requests, and what the pictures of a call share while it lasts."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from .callbacks import StepHook, check_cancel
from .denoiser import Preparation
from .editing import SourceImage, canvas_size
from .errors import Cancelled, RequestError, ZImageWarning
from .files.images import READERS
from .models.text_encoder import TextEncoder, Tokens
from .request import AnyRequest, GenerationRequest, ResolvedRequest, expand_requests, with_noise
from .rules import shown
from .sampling.noise import generator_noise, generator_seeds

Result = TypeVar("Result")

PICTURE_OPTIONS = frozenset(option.name for option in fields(GenerationRequest)) - {"prompt"}
"""The arguments of a call that say what a picture is."""


SHOWN = 200
"""Characters of what is cut off that a warning shows."""


class CancelToken(Protocol):
    """What `cancel=` takes: a `threading.Event`, or anything that says whether it is set."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True, eq=False)
class Leg:
    """A part of a picture's way: its noise `levels` (steps + 1,) in place of the request's, and the `latents`
    (1, C, H, W) that it begins with, in float32 on the device, where it does not begin as the request says."""

    levels: Tensor
    latents: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What the pictures of one call share. Lives as long as the call."""

    preparation: Preparation
    tokens: Mapping[tuple[str, int], Tokens]
    """The prompts' tokens by text and `max_sequence_length`."""
    cancel: CancelToken | None = None
    hook: StepHook | None = None
    bar: Any = None
    let_go: Callable[[], None] | None = None
    """What is done before a step that ran out of memory is taken again."""
    leg: Leg | None = None
    """What of its way a picture goes, if not all."""
    changed: set[str] = field(default_factory=set)
    """The tensors of the picture at work that the callback had a hand in."""

    def __post_init__(self) -> None:
        check_cancel(self.cancel)

    def take_changed(self) -> tuple[str, ...]:
        """What of the picture that is done was `changed`; the next one begins anew."""
        names = tuple(sorted(self.changed))
        self.changed.clear()
        return names

    def check_cancelled(self) -> None:
        """Raises `Cancelled` if the caller asked for it."""
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled("the picture was cancelled; nothing was written")


def resolve_call(
    prompt: Any,
    options: Mapping[str, Any],
    images_per_prompt: int,
    generator: Any,
    *,
    resolve: Callable[[AnyRequest], ResolvedRequest],
    latent_shape: Callable[[ResolvedRequest], Sequence[int]],
) -> list[ResolvedRequest]:
    """One resolved request per image of a call; `options` are the arguments that were given.

    Raises `RequestError` for anything that cannot work, before any noise is drawn.
    """
    given = [prompt] if isinstance(prompt, AnyRequest) else prompt
    if isinstance(given, Sequence) and given and all(isinstance(one, AnyRequest) for one in given):
        if options or generator is not None or images_per_prompt != 1:
            extra = ", ".join(options) or "generator and num_images_per_prompt"
            raise RequestError(f"a request says all there is; put {extra} into it instead")
        return [resolve(one) for one in given]
    requests = expand_requests(prompt, num_images_per_prompt=images_per_prompt, **_read_once(options))
    if generator is None:
        return [resolve(one) for one in requests]
    for name in ("seed", "latents"):
        if name in options:
            raise RequestError(f"{name} and generator are both given; only one can start the picture, drop one")
    resolved = [resolve(one) for one in requests]
    first, shapes = resolved[0], {tuple(latent_shape(one)) for one in resolved}
    draws_again = first.image is not None or first.hires is not None or first.diversity > 0
    if draws_again or len(shapes) > 1:  # more draws than one of one shape, which seeds stand for
        seeds = generator_seeds(generator, len(resolved))
        return [with_noise(one, seed=seed) for one, seed in zip(resolved, seeds, strict=True)]
    noise = generator_noise(generator, (len(resolved), *shapes.pop()))
    return [
        with_noise(one, seed=seed) if seed is not None else with_noise(one, latents=latents[None])
        for one, (seed, latents) in zip(resolved, noise, strict=True)
    ]


def as_request(value: Any, name: str = "request") -> AnyRequest:
    """`value`, or of a text the request of that prompt; raises `RequestError`, which calls it `name`, for others."""
    if isinstance(value, str):
        return GenerationRequest(value)
    if not isinstance(value, AnyRequest):
        raise RequestError(
            f"{name} must be a request or a text, got {shown(value)}; pass a GenerationRequest or a prompt, of one "
            "picture"
        )
    return value


def read_sources(request: AnyRequest) -> AnyRequest:
    """`request` with its images read, wherever they are; raises `RequestError` where they cannot be."""
    if not isinstance(request, GenerationRequest):
        return request
    read: dict[str, Any] = read_given(**{name: getattr(request, name) for name in READERS})
    return replace(request, **read) if read else request


def read_given(**images: Any) -> dict[str, SourceImage]:
    """Those of a request's images, by their names in it, that are given."""
    return {name: READERS[name](value) for name, value in images.items() if value is not None}


def warn_if_fitted(asked: AnyRequest, resolved: ResolvedRequest) -> None:
    """Warns where a picture is smaller than what it has its size from and nobody asked for that; where `resolve` was
    called."""
    source = resolved.image or resolved.control_image
    if source is None:
        return
    height, width = canvas_size(source, resolved.padding)
    if (asked.height, asked.width) == (None, None) and (height, width) != (resolved.height, resolved.width):
        what = "image with its padding" if resolved.padding else "image" if resolved.image else "control_image"
        warnings.warn(
            f"the {what} is {width}x{height}, and sides are multiples of 16: the picture is {resolved.width}x"
            f"{resolved.height}, cropped evenly; height and width scale it instead",
            ZImageWarning,
            stacklevel=3,
        )


def texts_of(request: ResolvedRequest) -> tuple[str, ...]:
    """The texts that condition a picture: the prompt, and with guidance the negative prompt."""
    return (request.prompt, request.negative_prompt) if request.guidance_scale > 0 else (request.prompt,)


def tokenize(requests: Iterable[ResolvedRequest], encoder: TextEncoder) -> dict[tuple[str, int], Tokens]:
    """The tokens of every text of `requests`; warns of each that does not fit, showing what is cut."""
    tokens = tokens_of(requests, encoder)
    warn_if_cut(tokens)
    return tokens


def tokens_of(requests: Iterable[ResolvedRequest], encoder: TextEncoder) -> dict[tuple[str, int], Tokens]:
    """The same without a warning, for a thread whose warnings nobody expects."""
    keys = ((text, request.max_sequence_length) for request in requests for text in texts_of(request))
    return {key: encoder.tokenize(*key) for key in dict.fromkeys(keys)}


def _read_once(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call with its images read, so that pictures share them; lists have one per prompt."""
    read = dict(options)
    for name, reader in READERS.items():
        value = options.get(name)
        if isinstance(value, list | tuple):
            read[name] = [reader(one) for one in value]
        elif value is not None:
            read[name] = reader(value)
    return read


def result_of(run: Generator[Any, None, Result]) -> Result:
    """What a generator returns, once it has run to its end."""
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value


def progress_bar(requests: Sequence[ResolvedRequest], options: Mapping[str, Any]) -> Any:
    """A tqdm bar over all steps of all pictures, or a context that gives `None` where `options` disable it, or the
    process has no console to show it on."""
    if options.get("disable") or (options.get("file") is None and sys.stderr is None):
        return nullcontext()
    from tqdm.auto import tqdm

    return tqdm(**{"total": sum(request.steps for request in requests), **options})


def warn_if_cut(tokens: Mapping[tuple[str, int], Tokens]) -> None:
    """Warns of each text that does not fit, where the caller's caller's caller is."""
    for one in tokens.values():
        if one.total > len(one.ids):
            more = "" if len(one.cut) <= SHOWN else f"... ({len(one.cut)} characters)"
            cut = repr(one.cut[:SHOWN]) + more if one.cut else "the end of the chat template"
            warnings.warn(
                f"the prompt has {one.total} tokens with its template, max_sequence_length is {len(one.ids)}; "
                f"this is cut off: {cut}",
                ZImageWarning,
                stacklevel=4,
            )
