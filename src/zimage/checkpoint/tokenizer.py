"""Qwen's tokenizer from files that nobody vouches for.

Every file is read and checked here, then a private copy with the known settings alone is given to transformers: what
else lies in the folder, and what else the files ask for, is never seen by it. A chat template is looked at and never
rendered; zimage writes Qwen's one user turn itself. Knows no models and no torch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from ..errors import CheckpointError
from .configs import LEGACY_TOKENIZER_FILES, TEMPLATE_FILE, TOKENIZER_FILES
from .fields import Field, exactly, flag, integer, read_config, refuse
from .reading import MAX_CONFIG, RESTORE, exists, read_json, read_text, reason, shown

START, END = "<|im_start|>", "<|im_end|>"

CONFIG, TOKENIZER, VOCABULARY, MERGES = TOKENIZER_FILES
ADDED, SPECIAL = LEGACY_TOKENIZER_FILES

_LIMITS = {TOKENIZER: 64 << 20, VOCABULARY: 32 << 20, MERGES: 32 << 20, TEMPLATE_FILE: 256 << 10}
_JSON = (TOKENIZER, VOCABULARY, ADDED, SPECIAL)
_PROBE = f"{START}user\na red fox, 红狐狸{END}\n{START}assistant\n"

_FLAGS = frozenset({"lstrip", "rstrip", "single_word", "normalized", "special"})


def _is_token(value: Any) -> bool:
    """Whether a token is text, or text with flags."""
    if not isinstance(value, dict):
        return isinstance(value, str)
    flags = {key: flag for key, flag in value.items() if key not in ("content", "__type")}
    known = set(flags) <= _FLAGS and all(isinstance(flag, bool) for flag in flags.values())
    return known and isinstance(value.get("content"), str) and value.get("__type", "AddedToken") == "AddedToken"


def _are_added(value: Any) -> bool:
    return isinstance(value, dict) and all(key.isdecimal() and _is_token(token) for key, token in value.items())


_TOKEN = Field(lambda value: value is None or _is_token(value), "a token or null", None)
_TOKENS = Field(
    lambda value: value in (None, {}) or (isinstance(value, list) and all(map(_is_token, value))),
    "a list of tokens",
    None,
)
_SPECIAL_TOKENS: dict[str, Field] = {
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _TOKEN),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), _TOKENS),
}
_SETTINGS: dict[str, Field] = {
    "tokenizer_class": exactly("Qwen2Tokenizer", "Qwen2TokenizerFast", default="Qwen2Tokenizer"),
    "add_bos_token": exactly(False, None, default=False),
    "add_eos_token": exactly(False, None, default=False),
    "add_prefix_space": exactly(False, None, default=False),
    "added_tokens_decoder": Field(_are_added, "an object of tokens by their ids", None),
    "clean_up_tokenization_spaces": flag(False),
    "model_max_length": Field(lambda value: type(value) in (int, float) and value > 0, "a positive number", 131072),
    "split_special_tokens": exactly(False, default=False),
    **_SPECIAL_TOKENS,
}
_REFUSED_NODES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


def load_tokenizer(folder: Path, vocabulary_size: int) -> Qwen2Tokenizer:
    """The tokenizer in `folder`, which must fit an embedding of `vocabulary_size` tokens."""
    files = _read_files(folder)
    try:
        tokenizer = _build(folder, files)
        problem = _problem(tokenizer, vocabulary_size)
    except (KeyboardInterrupt, SystemExit, MemoryError, CheckpointError):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        raise CheckpointError(f"{folder}: the tokenizer cannot be built: {reason(error)}; {_again(folder)}") from error
    if problem:
        raise CheckpointError(f"{folder}: {problem}; {_again(folder)}")
    return tokenizer


def _read_files(folder: Path) -> dict[str, str]:
    """The text of every file, checked; the config with its known settings only."""
    if not exists(folder / TOKENIZER) and not (exists(folder / VOCABULARY) and exists(folder / MERGES)):
        raise CheckpointError(f"{folder} should have {TOKENIZER}, or {VOCABULARY} and {MERGES}; {_again(folder)}")
    config = read_config(folder / CONFIG)
    template = config.get("chat_template")
    settings = _checked(folder / CONFIG, config, _SETTINGS)
    for text in _templates(folder / CONFIG, template):
        check_template(folder / CONFIG, text)
    files = {CONFIG: json.dumps(settings | ({"chat_template": template} if template else {}))}
    for name in (*TOKENIZER_FILES, *LEGACY_TOKENIZER_FILES, TEMPLATE_FILE):
        if name == CONFIG or not exists(folder / name):
            continue
        limit = _LIMITS.get(name, MAX_CONFIG)
        files[name] = read_text(folder / name, limit) if name not in _JSON else _read_json(folder / name, limit)
    if TEMPLATE_FILE in files:
        check_template(folder / TEMPLATE_FILE, files[TEMPLATE_FILE])
    return files


def _read_json(path: Path, limit: int) -> str:
    """The JSON of a file, written anew; transformers takes what these files hold for settings too."""
    content = read_json(path, limit)
    if path.name == ADDED:
        fields = dict.fromkeys(content, integer(0, 1 << 20))
    elif path.name == SPECIAL:
        fields = _SPECIAL_TOKENS
    else:
        return json.dumps(content)
    return json.dumps(_checked(path, content, fields))


def _checked(path: Path, config: dict[str, Any], fields: dict[str, Field]) -> dict[str, Any]:
    """What `fields` describe of a config, and nothing else."""
    known = {key: value for key, value in config.items() if key in fields}
    wrong = [key for key, value in known.items() if not fields[key].accepts(value)]
    refuse(path, [f"{_named(key)} must be {fields[key].wanted}, got {shown(known[key])}" for key in wrong[:5]])
    return known


def _named(key: str) -> str:
    return key if key in _SETTINGS else shown(key)


def _templates(path: Path, template: Any) -> list[str]:
    """The chat templates in a config: one text, or a list of named ones."""
    if template is None:
        return []
    found = template if isinstance(template, list) else [{"template": template}]
    texts = [item.get("template") if isinstance(item, dict) else None for item in found]
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{path}: chat_template must be text or a list of named texts, got {shown(template)}")
    return [text for text in texts if isinstance(text, str)]


def check_template(path: Path, text: str) -> None:
    """Refuse a chat template that is none, or reaches for more than its messages. It is parsed and never rendered."""
    if len(text) > _LIMITS[TEMPLATE_FILE]:
        raise CheckpointError(f"{path}: the chat template has {len(text)} characters, Qwen's has 4,000; {RESTORE}")
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
        problem = next(_template_problems(tree), None)
    except (jinja2.TemplateError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: the chat template cannot be parsed: {reason(error)}; {RESTORE}") from error
    if problem is None and (START not in text or END not in text):
        problem = f"has no {START} and {END}"
    if problem:
        raise CheckpointError(f"{path}: the chat template {problem}, which Qwen's does not; {RESTORE}")


def _template_problems(tree: nodes.Template) -> Iterator[str]:
    for node in tree.find_all(nodes.Node):
        if isinstance(node, _REFUSED_NODES):
            yield f"has a statement {type(node).__name__.lower()}"
        elif isinstance(node, nodes.Getattr | nodes.NSRef) and node.attr.startswith("_"):
            yield f"reads the private attribute {shown(node.attr)}"
        elif isinstance(node, nodes.Name) and node.name.startswith("_"):
            yield f"reads the private name {shown(node.name)}"
        elif isinstance(node, nodes.Getitem) and _is_private(node.arg):
            yield "reads a private item"
        elif isinstance(node, nodes.Const) and isinstance(node.value, str) and node.value.startswith("__"):
            yield f"has the private name {shown(node.value)}"
        elif isinstance(node, nodes.Filter) and node.name in ("attr", "map", "selectattr", "rejectattr", "groupby"):
            private = node.name == "attr" or any(_is_private(argument) for argument in node.args)
            if private:
                yield f"uses the filter {node.name} on private attributes"


def _is_private(node: nodes.Expr) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, str) and node.value.startswith("_")


def _build(folder: Path, files: dict[str, str]) -> Qwen2Tokenizer:
    with ExitStack() as private:
        copy = _copy(files, private)
        tokenizer = Qwen2Tokenizer.from_pretrained(copy, local_files_only=True)
    tokenizer.name_or_path = str(folder)
    tokenizer.init_kwargs["name_or_path"] = str(folder)
    # Settings of somebody's last call can be stored in tokenizer.json; prompts are neither cut nor filled here.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _copy(files: dict[str, str], private: ExitStack) -> str:
    """A folder with these files, for as long as `private` is open."""
    place = "the folder for temporary files"
    try:
        place = tempfile.gettempdir()
        folder = private.enter_context(tempfile.TemporaryDirectory(prefix="zimage-tokenizer-"))
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise CheckpointError(
            f"a copy of the tokenizer cannot be written to {place}: {reason(error)}; make room there, or name another "
            "folder in TMPDIR"
        ) from error
    return folder


def _problem(tokenizer: Qwen2Tokenizer, vocabulary_size: int) -> str | None:
    """What is wrong with a tokenizer that could be built, found by using it."""
    vocabulary = tokenizer.get_vocab()
    highest = max(len(tokenizer) - 1, max(vocabulary.values(), default=0))
    if highest >= vocabulary_size:
        return f"the tokenizer has ids up to {highest} and the text encoder's embedding {vocabulary_size} tokens"
    lost = [token for token in (START, END) if token not in vocabulary]
    if lost:
        return f"the tokenizer has no token {lost[0]}"
    ids = tokenizer(_PROBE)["input_ids"]
    marks = [ids[:1] == [vocabulary[START]], ids.count(vocabulary[START]) == 2, ids.count(vocabulary[END]) == 1]
    if not all(marks) or tokenizer.decode(ids, clean_up_tokenization_spaces=False) != _PROBE:
        return "the tokenizer does not give back a plain user turn that it encoded"
    return None


def _again(folder: Path) -> str:
    return f"download or copy {folder.name} again"
