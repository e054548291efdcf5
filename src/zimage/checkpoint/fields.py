"""What a field of an untrusted config may hold, and the reading of a whole config by a table of such fields.

Types and ranges are checked before any value reaches a library, and all that is wrong in a file is told at once. Knows
no particular config; `configs` has the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import CheckpointError
from .reading import MAX_CONFIG, RESTORE, read_json, shown

REQUIRED: Final = object()
"""The default of a field that must be there."""

_CODE_KEYS = frozenset({"auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "custom_code"})


@dataclass(frozen=True)
class Field:
    """One key of a config: which values it takes, in words, and what holds where it is absent."""

    accepts: Callable[[Any], bool]
    wanted: str
    default: object = REQUIRED


def integer(low: int, high: int, default: object = REQUIRED) -> Field:
    """A whole number in [low, high]."""
    return Field(lambda value: _is_integer(value, low, high), f"a whole number from {low} to {high}", default)


def integers(count: int, low: int, high: int, default: object = REQUIRED, *, step: int = 1) -> Field:
    """A list of `count` whole numbers in [low, high], multiples of `step`."""
    of = "" if step == 1 else f", multiples of {step}"
    wanted = f"a list of {count} whole number{'s' * (count > 1)} from {low} to {high}{of}"
    if low == high:
        wanted = f"{[low] * count}"
    return Field(lambda value: _is_list(value, count, lambda item: _is_integer(item, low, high, step)), wanted, default)


def number(low: float, high: float, default: object = REQUIRED, *, optional: bool = False) -> Field:
    """A number in (low, high); `optional` takes null as well."""
    wanted = f"a number between {low:g} and {high:g}{' or null' * optional}"
    return Field(lambda value: (optional and value is None) or _is_number(value, low, high), wanted, default)


def flag(default: object = REQUIRED) -> Field:
    """true or false."""
    return Field(lambda value: isinstance(value, bool), "true or false", default)


def exactly(*values: object, default: object = REQUIRED) -> Field:
    """One of `values`, of the same type."""
    wanted = " or ".join(_json_word(value) for value in values)
    return Field(lambda value: any(type(value) is type(one) and value == one for one in values), wanted, default)


def read_fields(path: Path, fields: Mapping[str, Field], *, others: str) -> dict[str, Any]:
    """The values of `fields` in the JSON config at `path`, with defaults filled in.

    `others` says what becomes of keys that no field describes: "refuse" (keys that start with `_` aside) or "drop".
    Raises one `CheckpointError` that lists everything wrong in the file.
    """
    config = read_config(path)
    problems = []
    values = {}
    for key, field in fields.items():
        value = config.get(key, field.default)
        if value is REQUIRED:
            problems.append(f"{key} is missing")
        elif key in config and not field.accepts(value):
            problems.append(f"{key} must be {field.wanted}, got {shown(value)}")
        else:
            values[key] = value
    unknown = sorted(key for key in config if key not in fields and not key.startswith("_"))
    if others == "refuse" and unknown:
        listed = ", ".join(shown(key) for key in unknown[:5])
        problems.append(f"{len(unknown)} unknown key{'s' * (len(unknown) > 1)}: {listed}")
    refuse(path, problems)
    return values


def read_config(path: Path) -> dict[str, Any]:
    """The JSON config at `path`; one that asks for code to be run is refused by the name of the key."""
    config = read_json(path, MAX_CONFIG)
    pending: list[Any] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            asked = sorted(key for key in value if key in _CODE_KEYS and value[key] not in (None, False))
            if asked:
                raise CheckpointError(
                    f"{path} asks for code to be run ({asked[0]}: {shown(value[asked[0]])}); zimage runs no code of a "
                    "checkpoint: remove the key if its weights are a plain Z-Image model"
                )
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    return config


def refuse(path: Path, problems: list[str]) -> None:
    """Raise `CheckpointError` if there are problems with the file at `path`."""
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}; {RESTORE}")


def _is_integer(value: Any, low: int, high: int, step: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high and value % step == 0


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low < value < high


def _is_list(value: Any, count: int, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) == count and all(accepts(item) for item in value)


def _json_word(value: object) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)
