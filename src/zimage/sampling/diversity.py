"""Caption features moved by noise of their own spread, for pictures that differ more from seed to seed.

A distilled model composes a caption much the same whatever it starts from. What it composes is decided in the first
steps, so there alone it is told something slightly else each time; in the others it is told the caption. Pure functions
of features and a seed; knows no models.
"""

from __future__ import annotations

from torch import Tensor

from .noise import seeded_noise

SHARE = 8
"""One of so many steps, and at least the first, is taken with moved features: of Turbo's eight the first."""
_MIX, _APART = 2654435761, 97
"""The multiplier of Knuth (The Art of Computer Programming, 6.4) is odd, so different seeds stay so; the noise is not
that which a picture starts from."""


def moved_steps(steps: int) -> int:
    """How many of the first steps are taken with moved features."""
    return max(1, steps // SHARE)


def moved(features: Tensor, seed: int, diversity: float) -> Tensor:
    """Caption features (tokens, width) plus normal noise of `seed`, of `diversity` times each feature's standard
    deviation over the tokens; in their type and on their device."""
    noise = seeded_noise((seed * _MIX + _APART) % 2**32, features.shape).to(features.device)
    wide = features.float()
    spread = wide.std(dim=0, keepdim=True, correction=0)  # (1, width)
    return (wide + diversity * spread * noise).to(features.dtype)
