"""The prompts of `zimage generate`: one from the command line or stdin, or those in a file, and templates opened.

Translates options; what templates mean is `zimage.prompts`'s.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import RequestError
from ..prompts import MOST_PROMPTS, expand, pick, read_prompts
from ..rules import MAX_SEED, integer
from .options import read_prompt


def prompts_of(
    prompt: str | None,
    *,
    file: Path | None,
    expands: bool,
    number: int | None,
    wildcards: Path | None,
    seed: int | None,
) -> list[str]:
    """The texts to draw, in order; `number` is how many of each template are picked, by `seed` if it is given.

    Raises `RequestError` for options that do not go together, and for what is no template.
    """
    if file is not None and prompt is not None:
        raise RequestError("a prompt and --prompts are both given; leave one out")
    if expands and number is not None:
        raise RequestError("--expand draws all that a template stands for and --pick some; leave one out")
    if wildcards is not None and not expands and number is None:
        raise RequestError("--wildcards has lists for templates; add --expand for all of them, or --pick 10 for some")
    texts = [read_prompt(prompt)] if file is None else read_prompts(file)
    prompts: list[str] = []
    for text, opened in zip(texts, _opened(texts, expands, number, wildcards, seed), strict=True):
        prompts += [text] if opened is None else opened
        if len(prompts) > MOST_PROMPTS:
            raise RequestError(f"there are more than {MOST_PROMPTS} prompts; one command draws no more, take fewer")
    return prompts


def _opened(
    texts: Sequence[str], expands: bool, number: int | None, wildcards: Path | None, seed: int | None
) -> Iterator[list[str] | None]:
    """What each text stands for, one after the other; `None` where texts are no templates."""
    if expands:
        yield from (expand(text, wildcards) for text in texts)
    elif number is None:
        yield from (None for _ in texts)
    else:
        count = integer("--pick", number, 1, MOST_PROMPTS)
        first = secrets.randbelow(MAX_SEED // 2) if seed is None else seed
        for index, text in enumerate(texts):
            yield pick(text, count, seed=first + index * count, wildcards=wildcards)
