"""From a LoRA's file to an `Adapter` that fits a model, or an error, with what a user should hear about it."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import AdapterError
from .adapter import Adapter, Shape, match, unmatched_notice
from .origin import foreign_architecture, trained_variant
from .source import Place, read_content


def load(
    place: Place, layers: Mapping[str, Shape], variant: str, source: str | None = None
) -> tuple[Adapter, tuple[str, ...]]:
    """The LoRA at `place` for a model of a `variant` with these `layers`, and what to warn of.

    `source` is what it is remembered to be from, if not what it is called.

    Raises `AdapterError` for a file that is damaged, of another architecture or kind, or does not fit.
    """
    content = read_content(place)
    foreign = foreign_architecture(content.metadata)
    if foreign:
        raise AdapterError(f"{place.name} was made for {foreign}, as its metadata says; take a LoRA for Z-Image")
    deltas, report = match(content.tensors, layers, place.name, content.scaling)
    trained = trained_variant(content.metadata)
    adapter = Adapter(source=source or place.name, digest=content.digest, deltas=deltas, report=report, variant=trained)
    notices = [unmatched_notice(report, place.name)]
    if trained not in (None, variant):
        notices.append(
            f"{place.name} was trained for {trained}, as its metadata says, and this model is {variant}: pictures may "
            "be worse than meant; a lower strength may help"
        )
    return adapter, tuple(notice for notice in notices if notice)
