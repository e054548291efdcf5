"""diffusers' step callback: what it is given, what it may change, and how it stops a picture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoiser import Conditioning
from .errors import Cancelled, RequestError
from .models.precision import is_finite
from .sampling.samplers import SamplerStep

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
"""What a callback may ask for by `callback_on_step_end_tensor_inputs`, and return changed."""

StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any] | None]


class PipelineHandle:
    """The pipeline as one call's callback sees it: it reads like the pipeline, and setting `_interrupt = True` or
    calling `cancel()` stops this call alone."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._interrupt = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def cancel(self) -> None:
        """Stop before the next step: the call raises `Cancelled`."""
        self._interrupt = True


@dataclass(frozen=True)
class StepHook:
    """A user's callback with the names of the tensors it wants."""

    callback: StepCallback
    names: tuple[str, ...]
    handle: PipelineHandle

    @classmethod
    def of(cls, pipeline: Any, callback: StepCallback | None, names: Sequence[str]) -> StepHook | None:
        """Checked; raises `RequestError` for a callback that cannot be called or names that are not there."""
        if callback is None:
            return None
        if not callable(callback):
            raise RequestError(f"callback_on_step_end must be callable, got {type(callback).__name__}")
        listed = isinstance(names, Collection) and not isinstance(names, str)
        if not listed or any(name not in CALLBACK_TENSORS for name in names):
            raise RequestError(
                f"callback_on_step_end_tensor_inputs must be a list out of {', '.join(CALLBACK_TENSORS)}; got {names!r}"
            )
        return cls(callback, tuple(names), PipelineHandle(pipeline))

    def __call__(self, step: SamplerStep, conditioning: Conditioning) -> tuple[Tensor | None, Conditioning]:
        """Run the callback after `step`: replaced latents or `None`, and the conditioning from here on.

        Raises `Cancelled` if the callback asked to stop, `RequestError` if what it returned cannot be used.
        """
        tensors = {
            "latents": step.latents,
            "prompt_embeds": [conditioning.positive],
            "negative_prompt_embeds": [] if conditioning.negative is None else [conditioning.negative],
        }
        timestep = torch.tensor(step.sigma * 1000.0)
        changes = self.callback(self.handle, step.index, timestep, {name: tensors[name] for name in self.names})
        if self.handle._interrupt:
            raise Cancelled(f"the callback stopped the picture after step {step.index + 1}")
        changes = changes or {}
        latents = changes.get("latents")
        if latents is step.latents:
            latents = None
        if latents is not None:
            _check_latents(latents, step.latents)
        positive = _only(changes, "prompt_embeds", conditioning.positive)
        negative = conditioning.negative
        if negative is not None:
            negative = _only(changes, "negative_prompt_embeds", negative)
        if positive is conditioning.positive and negative is conditioning.negative:
            return latents, conditioning
        return latents, Conditioning(positive, negative)


def _check_latents(latents: Any, current: Tensor) -> None:
    if not isinstance(latents, Tensor) or latents.shape != current.shape:
        came = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise RequestError(f"the callback returned latents {came}; they must be a tensor {tuple(current.shape)}")
    if not is_finite(latents):
        raise RequestError("the callback returned latents that are not finite (NaN or infinity)")


def _only(changes: Mapping[str, Any], name: str, current: Tensor) -> Tensor:
    given = changes.get(name, current)
    features = given[0] if isinstance(given, list | tuple) and len(given) == 1 else given
    if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != current.shape[1]:
        raise RequestError(f"the callback returned {name} that are not one tensor (tokens, {current.shape[1]})")
    return features
