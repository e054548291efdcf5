"""When two requests ask for the same: `Comparable`, the base of those that hold tensors, arrays or images, whose own
`==` answers something else, raises or takes long.

Knows no torch: tensors are known by their methods.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import fields
from typing import Any

from .rules import is_tensor


class Comparable:
    """Base of a frozen dataclass with `eq=False`: equal are those of one class whose fields all are.

    Tensors are equal by value, shape, dtype and device; what else has no hash, such as a Pillow image or an array, is
    equal to itself only; a list equals a tuple. The hash reads no tensor, and there always is one.
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self is other or _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash(_values(self))


class _Tensor:
    """A tensor where something is compared or has a hash."""

    def __init__(self, tensor: Any) -> None:
        self.tensor, self.kind = tensor, (tuple(tensor.shape), str(tensor.dtype), str(tensor.device))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Tensor) or self.kind != other.kind:
            return False
        return self.tensor is other.tensor or bool(self.tensor.equal(other.tensor))

    def __hash__(self) -> int:
        return hash(self.kind)


class _Itself:
    """What is equal to nothing else."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _values(request: Any) -> tuple[Hashable, ...]:
    return tuple(_comparable(getattr(request, one.name)) for one in fields(request))


def _comparable(value: Any) -> Hashable:
    if is_tensor(value):
        return _Tensor(value)
    if isinstance(value, Mapping):
        return frozenset((name, _comparable(one)) for name, one in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_comparable, value))
    try:
        hash(value)
    except (TypeError, ValueError):  # ValueError of a memoryview that can be written to
        return _Itself(value)
    return value
