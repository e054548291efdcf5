"""diffusers' step callback: what it is given, what it may change, and how it, or an event, stops a picture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoiser import Conditioning
from .errors import Cancelled, RequestError
from .models.precision import is_finite
from .rules import shown
from .sampling.samplers import SamplerStep

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
"""What a callback may ask for by `callback_on_step_end_tensor_inputs`, and return changed."""

StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any] | None]


class PipelineHandle:
    """The pipeline as one call's callback sees it: it reads like the pipeline, and setting `_interrupt = True` or
    calling `cancel()` stops this call alone."""

    _pipeline: Any = None  # `copy` asks for attributes before there are any

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
    taken: int = 0
    """Steps that another model took before."""

    @classmethod
    def of(cls, pipeline: Any, callback: StepCallback | None, names: Sequence[str], taken: int = 0) -> StepHook | None:
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
        return cls(callback, tuple(names), PipelineHandle(pipeline), taken)

    def __call__(
        self, step: SamplerStep, conditioning: Conditioning, changed: set[str]
    ) -> tuple[Tensor | None, Conditioning]:
        """Run the callback after `step`: replaced latents or `None`, and the conditioning from here on; the names of
        what it changed, also in place, are added to `changed`.

        Raises `Cancelled` if the callback asked to stop, `RequestError` if what it returned cannot be used.
        """
        timestep = torch.tensor(step.sigma * 1000.0, dtype=torch.float32, device="cpu")
        tensors, index = self._tensors(step, conditioning), self.taken + step.index
        changes = self.callback(self.handle, index, timestep, dict(tensors))
        if self.handle._interrupt:
            raise Cancelled(f"the callback stopped the picture after step {index + 1}")
        if not isinstance(changes, Mapping | None):
            raise RequestError(f"the callback returned {shown(changes)}; it must return a dict of tensors, or None")
        answer = {**tensors, **(changes or {})}
        latents = _latents(answer.get("latents"), step.latents)
        positive = _features(answer, "prompt_embeds", conditioning.positive)
        negative = conditioning.negative
        if negative is not None:
            negative = _features(answer, "negative_prompt_embeds", negative)
        outcome = {
            "latents": latents is not None,
            "prompt_embeds": positive is not conditioning.positive,
            "negative_prompt_embeds": negative is not conditioning.negative,
        }
        changed.update(name for name, differs in outcome.items() if differs)
        if positive is conditioning.positive and negative is conditioning.negative:
            return latents, conditioning
        return latents, Conditioning(positive, negative)

    def _tensors(self, step: SamplerStep, conditioning: Conditioning) -> dict[str, Any]:
        """What the callback asked for: copies, so that what it changed in place is told by comparing, and features of
        the run are shared with later pictures."""
        tensors: dict[str, Any] = {}
        for name, features in (
            ("prompt_embeds", conditioning.positive),
            ("negative_prompt_embeds", conditioning.negative),
        ):
            if name in self.names:
                tensors[name] = [] if features is None else [features.clone()]
        if "latents" in self.names:
            tensors["latents"] = step.latents.clone()
        return tensors


def check_cancel(cancel: object) -> None:
    """Raises `RequestError` for what is not `None` and cannot be asked whether it is set."""
    if cancel is not None and (isinstance(cancel, type) or not callable(getattr(cancel, "is_set", None))):
        raise RequestError(
            f"cancel must be an event, such as threading.Event(), that is set to stop the picture; got {shown(cancel)}"
        )


def _latents(latents: Any, current: Tensor) -> Tensor | None:
    """The latents to go on with, or `None` where they are equal to the current ones."""
    if latents is None or latents is current:
        return None
    if not isinstance(latents, Tensor) or latents.shape != current.shape:
        came = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise RequestError(f"the callback returned latents {came}; they must be a tensor {tuple(current.shape)}")
    if not is_finite(latents):
        raise RequestError("the callback returned latents that are not finite (NaN or infinity)")
    latents = latents.to(current)
    return None if torch.equal(latents, current) else latents


def _features(answer: Mapping[str, Any], name: str, current: Tensor) -> Tensor:
    """The caption features to go on with: `current` itself where they are equal to it."""
    given = answer.get(name, current)
    features = given[0] if isinstance(given, list | tuple) and len(given) == 1 else given
    if features is current:
        return current
    fits = isinstance(features, Tensor) and features.ndim == 2 and features.shape[1] == current.shape[1]
    if not fits or not features.is_floating_point() or not len(features) or not is_finite(features):
        raise RequestError(
            f"the callback returned {name} that are not one tensor (tokens, {current.shape[1]}) of finite numbers"
        )
    features = features.to(current)
    return current if torch.equal(features, current) else features
