"""Random-weight Z-Image checkpoints in the exact layout of the hub, for this project's tests and for those of apps.

Offers `build_checkpoint` and `checkpoint_parameters`; importing it loads no torch, calling them does. Knows nothing
of pipelines: what it writes is read by diffusers, transformers and zimage alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import build_checkpoint, checkpoint_parameters

__all__ = ["build_checkpoint", "checkpoint_parameters"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from . import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
