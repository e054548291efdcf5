"""What of its recipe a checkpoint names itself: how it is best drawn where a request leaves that open.

Plain data, what `scheduler_config.json` says of it, and the variant that comes of it. Knows no files and no requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .errors import CheckpointError
from .rules import check_sampler, number
from .variants import Variant, get_variant

KEYS = {"sampler": "_sampler", "guidance_scale": "_guidance_scale"}
"""What may be named, and as what in `scheduler_config.json`. diffusers, which has no place for it, passes over keys
that begin so."""


@dataclass(frozen=True, kw_only=True)
class OwnRecipe:
    """Of a model's recipe, what is its own; None is as its variant has it."""

    sampler: str | None = None
    guidance_scale: float | None = None

    @classmethod
    def of(cls, variant: Variant) -> OwnRecipe:
        """What a model's `variant` has that is not every such model's."""
        usual = get_variant(variant.name)
        return cls(**{name: getattr(variant, name) for name in KEYS if getattr(variant, name) != getattr(usual, name)})

    def to_config(self) -> dict[str, Any]:
        """As `scheduler_config.json` names it; what is the variant's is not named."""
        return {key: getattr(self, name) for name, key in KEYS.items() if getattr(self, name) is not None}

    def applied_to(self, variant: Variant) -> Variant:
        """`variant` with this for what a request leaves open.

        `RequestError` for a sampler that there is not and a number that no request may have, `CheckpointError` for
        guidance of a model that knows none.
        """
        own: dict[str, Any] = {}
        if self.sampler is not None:
            own["sampler"] = check_sampler(self.sampler)
        if self.guidance_scale is not None:
            own["guidance_scale"] = scale = number("guidance_scale", self.guidance_scale, 0.0, math.inf)
            if scale > 0 and not variant.supports_guidance:
                raise CheckpointError(
                    f"a checkpoint of {variant.title} must name guidance 0 or none, got {scale:g}: it was distilled "
                    f"without guidance; take {KEYS['guidance_scale']} out of its scheduler_config.json, or say "
                    "variant='base' if it is a base model"
                )
        return replace(variant, **own)
