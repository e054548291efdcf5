"""From the arguments of one call to its resolved requests, and what the pictures of a call share while it lasts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

from .callbacks import StepHook
from .denoiser import Preparation
from .errors import Cancelled, RequestError, ZImageWarning
from .models.text_encoder import TextEncoder, Tokens
from .request import AnyRequest, GenerationRequest, ResolvedRequest, expand_requests, with_noise
from .sampling.noise import generator_noise

Result = TypeVar("Result")

PICTURE_OPTIONS = frozenset(option.name for option in fields(GenerationRequest)) - {"prompt"}
"""The arguments of a call that say what a picture is."""


class CancelToken(Protocol):
    """What `cancel=` takes: a `threading.Event`, or anything that says whether it is set."""

    def is_set(self) -> bool: ...


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
    requests = expand_requests(prompt, num_images_per_prompt=images_per_prompt, **options)
    if generator is None:
        return [resolve(one) for one in requests]
    for name in ("seed", "latents"):
        if name in options:
            raise RequestError(f"{name} and generator are both given; only one can start the picture, drop one")
    resolved = [resolve(one) for one in requests]
    noise = generator_noise(generator, (len(resolved), *latent_shape(resolved[0])))
    return [
        with_noise(one, seed=seed) if seed is not None else with_noise(one, latents=latents[None])
        for one, (seed, latents) in zip(resolved, noise, strict=True)
    ]


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


def result_of(run: Generator[Any, None, Result]) -> Result:
    """What a generator returns, once it has run to its end."""
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value


def progress_bar(requests: Sequence[ResolvedRequest], options: Mapping[str, Any]) -> Any:
    """A tqdm bar over all steps of all pictures, or a context that gives `None` where `options` disable it."""
    if options.get("disable"):
        return nullcontext()
    from tqdm.auto import tqdm

    return tqdm(**{"total": sum(request.num_inference_steps for request in requests), **options})


def warn_if_cut(tokens: Mapping[tuple[str, int], Tokens]) -> None:
    """Warns of each text that does not fit, where the caller's caller's caller is."""
    for one in tokens.values():
        if one.total > len(one.ids):
            cut = repr(one.cut) if one.cut else "the end of the chat template"
            warnings.warn(
                f"the prompt has {one.total} tokens with its template, max_sequence_length is {len(one.ids)}; "
                f"this is cut off: {cut}",
                ZImageWarning,
                stacklevel=4,
            )
