"""The prompts of `zimage generate`: one from the command line or stdin, or those in a file, and templates opened.

Translates options; what templates mean is `zimage.prompts`'s.
"""

from __future__ import annotations

import secrets
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
    if expands:
        texts = [opened for text in texts for opened in expand(text, wildcards)]
    elif number is not None:
        count = integer("--pick", number, 1, MOST_PROMPTS)
        first = secrets.randbelow(MAX_SEED // 2) if seed is None else seed
        starts = range(first, first + count * len(texts), count)
        texts = [
            one
            for text, start in zip(texts, starts, strict=True)
            for one in pick(text, count, seed=start, wildcards=wildcards)
        ]
    if len(texts) > MOST_PROMPTS:
        raise RequestError(f"there are {len(texts)} prompts, at most {MOST_PROMPTS} are drawn by one command")
    return texts
