"""Random-weight Z-Image checkpoints in the exact layout of the hub, for this project's tests and for those of apps.

Offers `build_checkpoint`, `checkpoint_parameters`, `build_controlnet`, which is for the same models, and
`build_diffusers`, which has them in memory instead; importing it loads no torch, calling them does. What it writes is
read by diffusers, transformers and zimage alike.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import build_checkpoint, checkpoint_parameters
    from .controlnet import build_controlnet
    from .memory import build_diffusers

_HOMES = {
    "build_checkpoint": "checkpoint",
    "build_controlnet": "controlnet",
    "build_diffusers": "memory",
    "checkpoint_parameters": "checkpoint",
}

__all__ = ["build_checkpoint", "build_controlnet", "build_diffusers", "checkpoint_parameters"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
