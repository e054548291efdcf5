"""Messages of the library, which name Python's parameters, in the words of a command line: by its options.

Knows how a message speaks of a parameter, and no message itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

PARTS = ("text_encoder", "transformer", "vae", "controlnet", "adapters", "model")
"""Names that messages give to what a checkpoint holds, so that not every one of them is a parameter."""
_ALSO = {"overwrite": "--force"}
"""Parameters that go by another name here."""
_SAID_OF = r" (?:must|can|is|has|skips|predicts|leaves)\b|:"
"""What follows a parameter of one word where a message begins with it."""


def as_options(text: str, options: Mapping[str, str]) -> str:
    """`text` with the parameters in it as `options`, which has the option of each that the command takes.

    A name of several words, `guidance_scale`, is a parameter wherever it stands, and so is any that is given a value,
    `any_size=True`. One that is a word as any other, `image`, is one only where a message begins with it ("strength
    must be ...") or asks for it ("pass image", "leave strength out").
    """
    known = {name: option for name, option in options.items() if name not in PARTS} | _ALSO
    long = "|".join(name for name in known if "_" in name) or "(?!)"
    short = "|".join(name for name in known if "_" not in name)
    found = re.compile(
        rf"(?<![\w./-])(?:(?P<set>{long}|{short})=(?:True\b|'(?P<value>\w+)')"
        rf"|(?P<long>{long})(?![\w=(./-])"
        rf"|^(?P<first>{short})(?={_SAID_OF})"
        rf"|(?<=pass )(?P<given>{short})(?=[,;]|$)"
        rf"|(?<=leave )(?P<left>{short})(?= out\b))"
    )

    def option(match: re.Match[str]) -> str:
        name = next(filter(None, match.group("set", "long", "first", "given", "left")))
        return known[name] if match["value"] is None else f"{known[name]} {match['value']}"

    return found.sub(option, text)
