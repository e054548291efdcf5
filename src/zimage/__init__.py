"""Pictures from Z-Image and Z-Image-Turbo.

    from zimage import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained("turbo")
    pipe("a red fox in snow", seed=7).images[0].save("fox.png")

Names are imported when they are first used, so that `import zimage` loads no torch.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .adapters.adapter import AdapterReport
    from .checkpoint.convert import convert_checkpoint
    from .errors import (
        AdapterError,
        Cancelled,
        CheckpointError,
        MissingExtra,
        NonFiniteError,
        NotEnoughMemory,
        RequestError,
        ZImageError,
        ZImageWarning,
    )
    from .files.png import read_recipe
    from .files.recipe import Recipe
    from .hires import Hires
    from .legs import RelayOutput, RelayRequest
    from .output import Drawn, Replay, Step, ZImageOutput
    from .pipeline import ZImagePipeline
    from .relay import Relay
    from .request import GenerationRequest, ResolvedRequest
    from .variants import VARIANTS, Variant

_HOMES = {
    "AdapterError": "errors",
    "AdapterReport": "adapters.adapter",
    "Cancelled": "errors",
    "CheckpointError": "errors",
    "Drawn": "output",
    "GenerationRequest": "request",
    "Hires": "hires",
    "MissingExtra": "errors",
    "NonFiniteError": "errors",
    "NotEnoughMemory": "errors",
    "Recipe": "files.recipe",
    "Relay": "relay",
    "RelayOutput": "legs",
    "RelayRequest": "legs",
    "Replay": "output",
    "RequestError": "errors",
    "ResolvedRequest": "request",
    "Step": "output",
    "VARIANTS": "variants",
    "Variant": "variants",
    "ZImageError": "errors",
    "ZImageOutput": "output",
    "ZImagePipeline": "pipeline",
    "ZImageWarning": "errors",
    "convert_checkpoint": "checkpoint.convert",
    "read_recipe": "files.png",
}

__all__ = [
    "VARIANTS",
    "AdapterError",
    "AdapterReport",
    "Cancelled",
    "CheckpointError",
    "Drawn",
    "GenerationRequest",
    "Hires",
    "MissingExtra",
    "NonFiniteError",
    "NotEnoughMemory",
    "Recipe",
    "Relay",
    "RelayOutput",
    "RelayRequest",
    "Replay",
    "RequestError",
    "ResolvedRequest",
    "Step",
    "Variant",
    "ZImageError",
    "ZImageOutput",
    "ZImagePipeline",
    "ZImageWarning",
    "__version__",
    "convert_checkpoint",
    "read_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zimage' has no attribute {name!r}")
    with _collector_paused():
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


@contextmanager
def _collector_paused() -> Iterator[None]:
    """torch, transformers and diffusers make a million objects that stay: looking for garbage among them finds none
    and takes a fifth of their import. Afterwards they count as old, so that the next look does not start with them."""
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    try:
        yield
    finally:
        if not frozen:
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()


def __dir__() -> list[str]:
    return list(__all__)
