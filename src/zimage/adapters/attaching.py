"""The adapters of one transformer: put on whole or not at all, set to act for a while, and taken off to the last bit.

For one thread at a time; whoever holds the transformer orders the threads. Knows no files and no requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..models.quantized import StoredLinear
from ..models.transformer import BLOCKS, ZImageTransformer
from .adapter import Adapter, Shape
from .layers import Part, Switch, is_free, make_part, put_on, take_off


@dataclass(frozen=True, eq=False)
class Attached:
    """An adapter on a transformer under a name. It is itself only: another of the same name and file is another."""

    name: str
    adapter: Adapter


Picked = tuple[tuple[Attached, float], ...]
"""Adapters and strengths that a picture is made with, in the order of their names."""


def layers_of(transformer: ZImageTransformer) -> dict[str, Shape]:
    """The linear layers of a transformer by name: (out, in) of each."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear | StoredLinear)
    }


class Attachments:
    """What is attached to a transformer."""

    def __init__(self, transformer: ZImageTransformer) -> None:
        self._transformer = transformer
        self._attached: dict[str, Attached] = {}
        self._switch = Switch()
        self._parts: dict[str, dict[str, Part]] = {}
        self._at = self._now()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that are attached, sorted."""
        return tuple(sorted(self._attached))

    @property
    def bytes(self) -> int:
        """What all that is attached takes on the device."""
        return sum(part.bytes for parts in self._parts.values() for part in parts.values())

    def __getitem__(self, name: str) -> Adapter:
        return self._attached[name].adapter

    def attach(self, name: str, adapter: Adapter) -> None:
        """Put an adapter on; it does nothing yet. `AdapterError` where the name is taken; then all is as before."""
        if name in self._attached:
            raise AdapterError(f"there is an adapter named {name!r} already; choose another name, or delete that first")
        taken = [module for module in adapter.deltas if not is_free(self._layer(module), self._switch)]
        if taken:
            raise AdapterError(
                f"another pipeline has adapters on the same transformer, such as on {taken[0]}; detach them there first"
            )
        self.refresh()
        parts = self._make(adapter)
        for module, part in parts.items():
            put_on(self._layer(module), name, part, self._switch)
        self._parts[name], self._attached[name] = parts, Attached(name, adapter)

    def detach(self, name: str) -> None:
        """Take an adapter off: the layers that only it was on are what they were before."""
        for module in self._parts[name]:
            take_off(self._layer(module), name)
        del self._parts[name], self._attached[name]

    def clear(self) -> None:
        """Take all off."""
        for name in self.names:
            self.detach(name)

    def close(self) -> None:
        """Take all off and let go of the transformer."""
        self.clear()
        vars(self).pop("_transformer", None)

    def refresh(self) -> None:
        """Bring what is attached to where the transformer is now, in the type that it now computes in."""
        if self._at == self._now():
            return
        self._at = self._now()
        for name, attached in self._attached.items():
            self._parts[name] = self._make(attached.adapter)
            for module, part in self._parts[name].items():
                put_on(self._layer(module), name, part, self._switch)

    def pick(self, strengths: Mapping[str, float] | Sequence[tuple[str, float]]) -> Picked:
        """The adapters that a picture with these strengths is made with; `AdapterError` for an unknown name."""
        self.require(dict(strengths))
        return tuple((self._attached[name], strength) for name, strength in sorted(dict(strengths).items()) if strength)

    def require(self, names: Mapping[str, float] | Sequence[str]) -> None:
        """Raises `AdapterError` for a name that nothing is attached by."""
        unknown = [name for name in names if name not in self._attached]
        if unknown:
            known = f"there are {', '.join(map(repr, self.names))}" if self._attached else "none is loaded"
            raise AdapterError(f"there is no adapter named {unknown[0]!r}: {known}; load it first with load_adapter")

    @contextmanager
    def using(self, picked: Picked) -> Iterator[None]:
        """Within it these adapters act and no others; afterwards those that did before.

        Raises `AdapterError` where one was taken off since it was picked.
        """
        for one, _ in picked:
            if self._attached.get(one.name) is not one:
                raise AdapterError(
                    f"the adapter {one.name!r} was deleted while a picture was made with it; keep it until the picture "
                    "is done"
                )
        self.refresh()
        before = self._switch.active
        self._switch.active = tuple((one.name, _strength(value)) for one, value in picked)
        try:
            yield
        finally:
            self._switch.active = before

    def _now(self) -> tuple[torch.device, torch.dtype]:
        return self._transformer.x_pad_token.device, self._transformer.compute_dtype

    def _make(self, adapter: Adapter) -> dict[str, Part]:
        parts = {}
        with torch.inference_mode(False), torch.no_grad():
            for module, delta in adapter.deltas.items():
                with nullcontext() if delta.magnitude is None else self._hold(module):
                    parts[module] = make_part(delta, self._layer(module), *self._at)
        return parts

    def _hold(self, module: str) -> AbstractContextManager[None]:
        """Within it the weights of a layer are on the device."""
        blocks, _, rest = module.partition(".")
        if blocks not in BLOCKS:
            return nullcontext()
        return self._transformer.hold(self._transformer.get_submodule(f"{blocks}.{rest.partition('.')[0]}"))

    def _layer(self, module: str) -> Any:
        return self._transformer.get_submodule(module)


def _strength(value: float) -> Tensor:
    # A tensor, because compiled code has numbers fixed in it.
    return torch.tensor(value, dtype=torch.float64, device="cpu")
