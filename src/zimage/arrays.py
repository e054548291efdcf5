"""Flags and lists that are given as numpy's or torch's. Knows neither: what is given is asked by its own methods."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """What an array without or with one axis holds, as Python's own, such as a list of numbers; else `value` itself."""
    shape = getattr(value, "shape", None)
    return value.tolist() if isinstance(shape, tuple) and len(shape) < 2 and hasattr(value, "tolist") else value
