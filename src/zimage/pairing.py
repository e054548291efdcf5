"""Two pipelines that can hand a picture over: whether they fit together, and both loaded with what they share once.

Knows models and plans; what is done with the pair is `relay`'s.
"""

from __future__ import annotations

import os
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from . import runtime
from .checkpoint.alike import difference
from .checkpoint.load import Components, load_components
from .checkpoint.locate import Location, locate
from .checkpoint.sizes import sizes_of
from .checkpoint.survey import Survey, survey
from .errors import CheckpointError, RequestError
from .memory.budget import find_budget, held_memory
from .memory.ladder import with_less
from .memory.pairs import plan_pair
from .memory.plan import Plan
from .memory.planner import Planning, check_weights, plan_model
from .memory.residency import Residency
from .models.attention import check_works
from .models.precision import choose_dtype
from .parts import described
from .pipeline import ZImagePipeline
from .variants import BASE, TURBO, Variant, detect_variant

if TYPE_CHECKING:
    from typing import Self

NAMES = (BASE.name, TURBO.name)
_SHARED = {"vae": "VAE", "text_encoder": "text encoder"}


class Pair(NamedTuple):
    """A base model and a Turbo that share text encoder and VAE, and the plan that both were loaded for."""

    base: ZImagePipeline
    turbo: ZImagePipeline
    plan: Plan


class Together:
    """Two pipelines that are let go of together."""

    base: ZImagePipeline
    turbo: ZImagePipeline

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.base!r}, {self.turbo!r}>"

    def close(self) -> None:
        """Let go of both pipelines, which cannot be used afterwards either. `with` does it at the end of its block."""
        self.turbo.close()
        self.base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def check_pair(base: Any, turbo: Any) -> None:
    """Raises `RequestError` unless `base` can hand its latents over to `turbo`.

    Text encoders and VAEs that are not the same modules are compared, value by value where both have them at hand, else
    by the files that they were loaded from, where both have some. `CheckpointError` where those cannot be read.
    """
    for name, pipe in zip(NAMES, (base, turbo), strict=True):
        if not isinstance(pipe, ZImagePipeline):
            raise RequestError(f"a relay's {name} must be a ZImagePipeline, got {type(pipe).__name__}")
    _check_order([base.variant, turbo.variant])
    check_place(base, turbo)
    pairs = {
        "vae": (base.autoencoder.vae, turbo.autoencoder.vae),
        "text_encoder": (base.text_encoder.model, turbo.text_encoder.model),
    }
    for component, modules in pairs.items():
        reason = _module_difference(*modules)
        if not reason and not _are_at_hand(*modules):
            reason = _file_difference(component, base, turbo)
        if reason:
            raise RequestError(_not_alike(component, reason))


def check_place(base: ZImagePipeline, turbo: ZImagePipeline) -> None:
    """Raises `RequestError` unless both compute on one device and in one dtype."""
    for what, values in (("device", (base.device, turbo.device)), ("dtype", (base.dtype, turbo.dtype))):
        if values[0] != values[1]:
            raise RequestError(f"a relay's models must have one {what}, base has {values[0]} and turbo {values[1]}")


def load_pair(
    base: str | os.PathLike[str],
    turbo: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    memory: str | int,
    weight_dtype: str | None,
    quantize_activations: bool,
    attention_backend: str,
    **access: Any,
) -> Pair:
    """Load both with one text encoder and one VAE, under one plan; `access` is what `locate` takes.

    Raises `CheckpointError` for what cannot be found, read or put together, `NotEnoughMemory` before anything is
    loaded for what cannot fit, `RequestError` for wrong arguments.
    """
    check_weights(weight_dtype, quantize_activations)
    target = runtime.choose_device(device)
    precision = choose_dtype(dtype or "auto", target)
    check_works(attention_backend, target, precision)
    budget = find_budget(memory, target)
    places = [locate(model, **access) for model in (base, turbo)]
    found = [_surveyed(place) for place in places]
    _check_order(
        [
            one.configs.own.applied_to(detect_variant(variant=None, hub_id=place.hub_id, shift=one.configs.shift))
            for place, one in zip(places, found, strict=True)
        ]
    )
    for component in _SHARED:
        if reason := difference(found[0], found[1], component):
            raise CheckpointError(_not_alike(component, reason))
    kind = str(precision).removeprefix("torch.")
    make = partial(
        plan_model, dtype=kind, budget=budget, weights=weight_dtype, quantize_activations=quantize_activations
    )
    plans = plan_pair(sizes_of(found[0]), sizes_of(found[1]), make)
    held = held_memory(target)
    lender = ZImagePipeline.from_pretrained(base, dtype=precision, device=target, memory=plans.base, **access)
    made = Pair(lender, _finisher(lender, places[1], plans.turbo, target, held), plans.both)
    for pipe in (made.base, made.turbo):
        pipe.set_attention_backend(attention_backend)
    return made


def _finisher(lender: ZImagePipeline, place: Location, plan: Plan, device: torch.device, held: int) -> ZImagePipeline:
    """Turbo with a transformer of its own, and with the text encoder and the autoencoder of `lender`; they take turns.

    What of the text encoder passes through the device does so by the lender's ring.
    """
    planning = Planning(lambda _: plan)
    load = partial(
        load_components, place.folder, dtype=lender.dtype, device=device, planner=planning, parts=("transformer",)
    )
    parts: Components = with_less(load, planning.step_down)
    made = ZImagePipeline(
        parts.shift,
        lender.autoencoder.vae,
        lender.text_encoder.model,
        lender.text_encoder.tokenizer,
        parts.transformer,
        variant=TURBO.name,
        sampler=parts.own.sampler,
        guidance_scale=parts.own.guidance_scale,
        model=described(place),
        folder=place.folder,
    )
    made.text_encoder, made.autoencoder = lender.text_encoder, lender.autoencoder
    made._plan, made._held_before = parts.plan, held
    made._residency = Residency(
        None,
        parts.transformer,
        placement=None if parts.plan is None else parts.plan.placement,
        device=device,
        layers=parts.layers,
        read=parts.read,
    )
    made._pair, lender._pair = (weakref.ref(lender),), (weakref.ref(made),)
    return made


def _surveyed(place: Location) -> Survey:
    found = survey(place.folder)
    found.require()
    return found


def _check_order(variants: list[Variant]) -> None:
    names = tuple(variant.name for variant in variants)
    if names != NAMES:
        raise RequestError(
            f"a relay goes from base to turbo, got {names[0]} and {names[1]}; "
            + ("change their order" if names == NAMES[::-1] else "it needs one model of each kind")
        )


def _not_alike(component: str, reason: str) -> str:
    return (
        f"the models do not share their {_SHARED[component]}, so the latents of one mean something else to the other: "
        f"{reason}; take two models of one family"
    )


def _module_difference(one: nn.Module, other: nn.Module) -> str:
    """In what two modules of one kind differ, "" if in nothing that can be compared here.

    What waits in files is compared by shape alone, and what is stored in another number of bits not at all.
    """
    if one is other:
        return ""
    settings = ("scaling_factor", "shift_factor", "hidden_size", "rope_theta")
    for setting in settings:
        values = [getattr(module.config, setting, None) for module in (one, other)]
        if values[0] != values[1]:
            return f"{setting} is {values[0]} and {values[1]}"
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    for name in ours.keys() & theirs.keys():
        first, second = ours[name], theirs[name]
        if first.dtype != second.dtype:
            continue
        if first.shape != second.shape:
            return f"{name} is {list(first.shape)} and {list(second.shape)}"
        if not (first.is_meta or second.is_meta) and not _equal(first, second):
            return f"the values of {name} differ"
    counts = [len(getattr(module, "layers", ())) for module in (one, other)]
    return f"one has {counts[0]} layers and the other {counts[1]}" if counts[0] != counts[1] else ""


def _are_at_hand(one: nn.Module, other: nn.Module) -> bool:
    """Whether all values of two modules can be compared: they are the same, or in memory in the same types."""
    ours, theirs = (
        {name: None if parameter.is_meta else parameter.dtype for name, parameter in module.named_parameters()}
        for module in (one, other)
    )
    return one is other or (ours == theirs and None not in ours.values())


def _file_difference(component: str, *pipes: ZImagePipeline) -> str:
    """In what the files differ that a component of two pipelines was loaded from, "" where one of them has none."""
    found = []
    for pipe in pipes:
        if pipe._folder is None or not pipe._folder.is_dir():
            return ""
        found.append(survey(pipe._folder, pipe._files, parts=(component,)))
        found[-1].require()
    return difference(found[0], found[1], component)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, whatever the types can do."""
    first, second = (tensor.detach().contiguous().view(torch.uint8) for tensor in (one, other.to(one.device)))
    return torch.equal(first, second)
