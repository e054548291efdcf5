"""What the recipe of a relay's picture has besides: the noise level of the handover, and Turbo's own recipe.

Knows what the two parts of one picture have in common; how a recipe is read and written is `recipe`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..rules import number
from ..variants import BASE, TURBO

if TYPE_CHECKING:
    from .recipe import Recipe

KEYS = ("handover", "turbo")
SHARED = ("prompt", "seed", "height", "width", "max_sequence_length", "image")
"""What both models are asked alike."""


def turbo_document(relay: Any) -> Mapping[str, Any]:
    """Turbo's part of a relay's JSON; raises `RequestError` where it is none, or a relay itself."""
    if not isinstance(relay, Mapping) or set(relay) != set(KEYS):
        raise RequestError(f"the recipe's relay must be an object with {' and '.join(KEYS)}")
    turbo = relay["turbo"]
    if not isinstance(turbo, Mapping) or "relay" in turbo:
        raise RequestError("the recipe's relay must have a recipe without a relay as its turbo")
    return turbo


def check_relay(recipe: Recipe) -> float:
    """The handover of a recipe, 0 where there is none; raises `RequestError` unless its parts are of one picture."""
    base, turbo = recipe.request, recipe.turbo
    if turbo is None:
        if recipe.handover != 0:
            raise RequestError("the recipe has a handover and nobody to hand over to")
        return 0.0
    handover = number("handover", recipe.handover, 0.0, 1.0)
    same = all(getattr(base, name) == getattr(turbo.request, name) for name in SHARED)
    variants = (base.variant, turbo.request.variant) == (BASE.name, TURBO.name)
    if not (variants and same and turbo.pixels == recipe.pixels and turbo.turbo is None and 0 < handover < 1):
        raise RequestError("the two parts of the recipe's relay are not of one picture, of base and then Turbo")
    return handover


def require_one_model(recipe: Recipe) -> None:
    """Raises `RequestError` for a relay's picture."""
    if recipe.turbo is not None:
        raise RequestError(
            "the picture was made by a relay of two models, base and Turbo; zimage.Relay.from_pretrained(...).replay "
            "makes it again"
        )
