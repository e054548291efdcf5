"""Templates of prompts: `a {red|blue} fox` stands for two prompts, `__animal__` for any line of a list of that name.

`expand` gives all prompts of a template, `pick` some at random, `read_prompts` those in a file. Each is a prompt like
any other, with a picture and a recipe of its own. Nothing is taken for a template unless it is passed here: to the
models braces are letters. Knows texts and files of texts only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from random import Random

from .errors import RequestError
from .rules import MAX_SEED, integer, shown

MOST_PROMPTS = 10_000
"""Prompts that a template is expanded to."""
MOST_BYTES = 2**24
"""Of a file of prompts or of a list."""
MOST_LETTERS = 2**20
"""Of the longest prompt that a template stands for, choices counted as letters."""
MOST_NESTED = 32
"""Groups and lists within one another."""

Wildcards = Mapping[str, Sequence[str]] | str | os.PathLike[str]
"""Lists by name, or a folder with a text file for each: `animal.txt` is `__animal__`, `sea/fish.txt` `__sea/fish__`."""

_NAME = re.compile(r"__([A-Za-z0-9](?:[A-Za-z0-9/-]|_(?!_))*)__")
_MANY = 10**9
_SPECIAL = "\\{|}"
_FOREIGN = re.compile(r"\s*(?:[\d-]*\$\$|\d+(?:\.\d+)?::)")
"""How others write that several options are taken at once, or that some are likelier."""


@dataclass(frozen=True)
class Choice:
    """One of some templates."""

    options: tuple[Template, ...]

    @cached_property
    def depth(self) -> int:
        """How many choices are within one another."""
        return 1 + max(option.depth for option in self.options)

    @cached_property
    def size(self) -> int:
        """Letters and choices of the longest."""
        return 1 + max(option.size for option in self.options)

    @cached_property
    def count(self) -> int:
        return min(_MANY, sum(option.count for option in self.options))

    def texts(self) -> Iterator[str]:
        for option in self.options:
            yield from option.texts()

    def picked(self, random: Random) -> str:
        return self.options[int(random.random() * len(self.options))].picked(random)


@dataclass(frozen=True)
class Template:
    """Texts and choices that follow each other."""

    parts: tuple[str | Choice, ...]

    @property
    def depth(self) -> int:
        return max((part.depth for part in self.parts if isinstance(part, Choice)), default=0)

    @property
    def size(self) -> int:
        return sum(len(part) if isinstance(part, str) else part.size for part in self.parts)

    @cached_property
    def count(self) -> int:
        """How many prompts it stands for, the same ones counted as often as they occur; no more than a milliard."""
        count = 1
        for part in self.parts:
            count *= 1 if isinstance(part, str) else part.count
            count = min(_MANY, count)
        return count

    def texts(self) -> Iterator[str]:
        """All of them; the last choice changes first."""
        wholes = [[part] if isinstance(part, str) else list(part.texts()) for part in self.parts]
        return map("".join, product(*wholes))

    def picked(self, random: Random) -> str:
        """One of them; each option of a choice is as likely as the others."""
        return "".join(part if isinstance(part, str) else part.picked(random) for part in self.parts)


def expand(template: str, wildcards: Wildcards | None = None) -> list[str]:
    """All prompts that a template stands for, each once; the last choice changes first.

    Args:
        template: `{red|blue}` is either, options may be empty and hold choices themselves; `__animal__` is a line of a
            list. `\\{`, `\\|`, `\\}` and `\\_` are the letters themselves.
        wildcards: the lists, by name or as a folder of text files. An entry may be a template.

    Raises `RequestError` for a group that is not closed, a list that is not there, and more than 10,000 prompts.
    """
    parsed = parse(template, wildcards)
    if parsed.count > MOST_PROMPTS:
        number = f"{parsed.count} or more" if parsed.count == _MANY else parsed.count
        raise RequestError(
            f"the template stands for {number} prompts, of which at most {MOST_PROMPTS} are made; "
            "take some at random (pick, --pick), or fewer options"
        )
    return list(dict.fromkeys(parsed.texts()))


def pick(template: str, count: int, *, seed: int = 0, wildcards: Wildcards | None = None) -> list[str]:
    """`count` prompts of a template at random, the same ones may come again; prompt k is drawn from `seed + k` alone.

    Arguments and errors as for `expand`.
    """
    number = integer("count", count, 1, MOST_PROMPTS)
    first = integer("seed", seed, 0, MAX_SEED - number + 1)
    parsed = parse(template, wildcards)
    return [parsed.picked(Random(first + index)) for index in range(number)]


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The prompts in a text file (UTF-8), one on each line; empty lines and those that begin with # are none.

    Raises `RequestError` if there are none, or the file cannot be read.
    """
    if not isinstance(path, str | os.PathLike):
        raise RequestError(f"path must be that of a text file of prompts, got {shown(path)}")
    prompts = _lines(Path(path))
    if not prompts:
        raise RequestError(f"{path} has no prompts: write one on each line (lines that begin with # are left out)")
    return prompts


def parse(template: str, wildcards: Wildcards | None = None) -> Template:
    """A template as data; raises `RequestError` where it is none."""
    if not isinstance(template, str):
        raise RequestError(f"a template must be a text, got {shown(template)}")
    parsed = _Parser(template, _Lists(wildcards), ()).whole()
    if parsed.size > MOST_LETTERS:
        raise RequestError(f"the template stands for prompts of more than {MOST_LETTERS} letters; make it shorter")
    return parsed


class _Parser:
    """Reads one text from left to right."""

    def __init__(self, text: str, lists: _Lists, inside: tuple[str, ...]) -> None:
        self._text, self._lists, self._inside = text, lists, inside
        self._at = self._depth = 0

    def whole(self) -> Template:
        template = self._template()
        if self._at < len(self._text):
            raise self._wrong("a } closes no {", self._at)
        return template

    def _template(self) -> Template:
        """Up to what ends a group or an option, or to the end."""
        parts: list[str | Choice] = []
        letters: list[str] = []
        while self._at < len(self._text):
            letter = self._text[self._at]
            name = _NAME.match(self._text, self._at)
            if letter == "}" or (letter == "|" and self._depth):
                break
            if letter == "{" or name is not None:
                parts.append("".join(letters))
                letters.clear()
                choice = self._group() if name is None else self._listed(name)
                self._check_depth(choice.depth)
                parts.append(choice)
                continue
            if letter == "\\" and self._text[self._at + 1 : self._at + 2] in (*_SPECIAL, "_"):
                self._at += 1
                letter = self._text[self._at]
            letters.append(letter)
            self._at += 1
        return Template((*parts, "".join(letters)))

    def _group(self) -> Choice:
        start, options = self._at, list[Template]()
        self._depth += 1
        self._check_depth(self._depth)
        while self._at < len(self._text) and (not options or self._text[self._at] == "|"):
            self._at += 1
            if _FOREIGN.match(self._text, self._at):
                raise self._wrong("numbers of options (2$$) and weights (3::) are not known here", self._at)
            options.append(self._template())
        if self._at == len(self._text):
            raise self._wrong("a { is not closed", start)
        self._at += 1
        self._depth -= 1
        return Choice(tuple(options))

    def _listed(self, match: re.Match[str]) -> Choice:
        name, self._at = match[1], match.end()
        if name in self._inside:
            raise RequestError(f"the list {name} contains itself ({' > '.join((*self._inside, name))}); take that out")
        self._check_depth(len(self._inside) + 1)
        return self._lists.choice(name, (*self._inside, name))

    def _check_depth(self, depth: int) -> None:
        if depth > MOST_NESTED:
            raise RequestError(f"more than {MOST_NESTED} groups and lists are within one another; use fewer")

    def _wrong(self, what: str, place: int) -> RequestError:
        where = f"in the list {self._inside[-1]}, " if self._inside else ""
        return RequestError(
            f"{where}at character {place + 1} of {shown(self._text)}: {what}; a brace that is meant as such is "
            f"written \\{{ or \\}}"
        )


class _Lists:
    """The lists that a template names, each read once, however often it is named."""

    def __init__(self, wildcards: Wildcards | None) -> None:
        if not isinstance(wildcards, Mapping | str | os.PathLike | None):
            raise RequestError(
                f"wildcards must be lists by name, like {{'animal': ['fox', 'owl']}}, or a folder of text files; got "
                f"{shown(wildcards)}"
            )
        self._wildcards = wildcards
        self._known: dict[str, Choice] = {}

    def choice(self, name: str, inside: tuple[str, ...]) -> Choice:
        """One of the entries of a list, which is within others."""
        if name not in self._known:
            entries = _entries(name, self._wildcards)
            self._known[name] = Choice(tuple(_Parser(entry, self, inside).whole() for entry in entries))
        return self._known[name]


def _entries(name: str, wildcards: Wildcards | None) -> Sequence[str]:
    if wildcards is None:
        raise RequestError(f"__{name}__ names a list and none are given; pass wildcards (--wildcards), or write \\__")
    if isinstance(wildcards, Mapping):
        entries, where = wildcards.get(name), f"those given: {', '.join(sorted(map(str, wildcards))) or 'none'}"
        if entries is not None and (isinstance(entries, str) or not _are_texts(entries)):
            raise RequestError(f"the list {name} must be a list of texts, got {shown(entries)}")
    else:
        folder = Path(wildcards)
        if not folder.is_dir():
            raise RequestError(f"wildcards must be a folder of text files, or lists by name; {folder} is no folder")
        file = folder / f"{name}.txt"
        found = sorted(one.relative_to(folder).with_suffix("").as_posix() for one in folder.rglob("*.txt"))
        entries, where = _lines(file) if file.is_file() else None, f"those in {folder}: {', '.join(found) or 'none'}"
    if entries is None:
        raise RequestError(f"there is no list {name} among {where[:300]}")
    if not entries:
        raise RequestError(f"the list {name} is empty")
    return entries


def _are_texts(entries: object) -> bool:
    return isinstance(entries, Sequence) and all(isinstance(one, str) for one in entries)


def _lines(file: Path) -> list[str]:
    """The lines of a text file that say something."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise RequestError(f"cannot read {file}: {error.strerror or error}") from error
    if len(data) > MOST_BYTES:
        raise RequestError(f"{file} is larger than {MOST_BYTES >> 20} MiB; take another file")
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 text (byte {error.start + 1}); save it as UTF-8") from None
    return [line for line in lines if line and not line.startswith("#")]
