"""A pipeline's adapters: loaded, set to act in all pictures or in one, saved, and taken off again.

What they compute is `adapters`' business, where the models sit is `placed`'s. Strengths that are set here are those of
pictures that say nothing of their own; a picture's are fixed when it is asked for.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, NoReturn

import torch

from . import runtime
from .adapters.adapter import AdapterReport
from .adapters.attaching import Attachments, Picked, layers_of
from .adapters.loading import load
from .adapters.source import locate_adapter
from .adapters.writing import save_adapter
from .arrays import plain
from .errors import AdapterError, NotEnoughMemory, RequestError, ZImageWarning
from .files.png import brief
from .files.recipe import Recipe
from .memory.ladder import is_out_of_memory
from .memory.plan import Plan
from .memory.planner import follow, with_adapters
from .models.autoencoder import Autoencoder
from .models.text_encoder import TextEncoder
from .models.transformer import ZImageTransformer
from .placed import Placed
from .request import AnyRequest, GenerationRequest, ResolvedRequest
from .rules import adapter_name, resolve_adapters, shown
from .rules import strength as checked_strength
from .variants import Variant


class Adapted(Placed):
    """The models of a pipeline with what is attached to the transformer."""

    variant: Variant
    _pair: tuple[weakref.ref[Adapted], ...] = ()

    def __init__(self, text_encoder: TextEncoder, transformer: ZImageTransformer, autoencoder: Autoencoder) -> None:
        super().__init__(text_encoder, transformer, autoencoder)
        self._attachments = Attachments(self.transformer)
        self._strengths: dict[str, float] = {}
        self._set_aside: dict[str, float] = {}

    @property
    def adapters(self) -> dict[str, float]:
        """The strength of each adapter in pictures that do not say otherwise; 0 is off."""
        return dict(self._strengths)

    def load_adapter(
        self,
        source: str | os.PathLike[str],
        name: str | None = None,
        *,
        strength: float = 1.0,
        weight_name: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> AdapterReport:
        """Load a LoRA beside those that are loaded; nothing of the model's weights changes.

        Args:
            source: a safetensors file, a folder with one, a hub id, or "owner/name/file.safetensors" there, as PEFT,
                diffusers, kohya's scripts, ai-toolkit or ComfyUI write it; DoRA too.
            name: what to call it, by default the file's or the folder's name without its end.
            strength: of pictures that do not say otherwise; 1 is as trained, 0 off until a picture asks for it.
            weight_name: the file in a folder or repository that has several.
            revision, cache_dir, token, local_files_only: as for `from_pretrained`.

        Raises `AdapterError` for a file that is damaged, made for another architecture or shape, or matches no layer,
        and for a name that is taken; `NotEnoughMemory`. Then all is as before. It warns of keys that do not act, and of
        a file that says it was trained for the other variant.
        """
        value = checked_strength("an adapter's strength", strength)
        place = locate_adapter(
            source,
            weight_name=weight_name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        named = PurePath(place.name if place.hub else os.path.abspath(place.name))
        called = adapter_name(named.stem[:64].strip() if name is None else name)
        remembered = place.name if place.hub else runtime.portable_path(place.file)
        adapter, notices = load(place, layers_of(self.transformer), self.variant.name, remembered)
        for notice in notices:  # first, because warnings may be errors
            warnings.warn(notice, ZImageWarning, stacklevel=2)
        with self._turn:
            try:
                self._attachments.attach(called, adapter)
                self._make_room(f"the adapter {called!r}")
            except BaseException as error:
                if called not in self._strengths and called in self._attachments.names:
                    self._attachments.detach(called)
                    self._account()
                if isinstance(error, Exception) and is_out_of_memory(error):
                    raise NotEnoughMemory(f"memory ran out while the adapter {called!r} was loaded") from error
                raise
            self._strengths[called] = value
        return adapter.report

    def set_adapters(
        self,
        adapter_names: str | Sequence[str] | Mapping[str, float],
        adapter_weights: float | Sequence[float] | None = None,
    ) -> None:
        """Let these adapters act in pictures that do not say otherwise, each as strong as given or 1, and no others.

        Names and strengths may be one mapping, as `adapters` of a call is.
        """
        if isinstance(adapter_names, Mapping) and adapter_weights is None:
            adapter_weights = list(adapter_names.values())
        names, adapter_weights = _names(adapter_names), plain(adapter_weights)
        weights = adapter_weights if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        if len(weights) != len(names) or len(set(names)) != len(names):
            raise RequestError(f"adapter_weights has {len(weights)} entries for {len(names)} names; pass one for each")
        strengths = [1.0 if one is None else checked_strength("each of adapter_weights", one) for one in weights]
        with self._turn:
            self._attachments.require(names)
            self._strengths = {name: 0.0 for name in self._strengths} | dict(zip(names, strengths, strict=True))
            self._set_aside = {}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters off; with the last the model is to the bit what it was without."""
        names = list(dict.fromkeys(_names(adapter_names)))
        with self._turn:
            self._attachments.require(names)
            for name in names:
                self._attachments.detach(name)
                del self._strengths[name]
                self._set_aside.pop(name, None)
            self._account()

    def save_adapter(
        self, target: str | os.PathLike[str], name: str, *, naming: str = "peft", overwrite: bool = False
    ) -> Path:
        """Write a loaded adapter to a .safetensors file, or into a folder that exists; returns the file.

        `naming` is "peft", as diffusers writes and reads it, or "comfyui". Written whole or not at all; a file that
        exists is an error without `overwrite`. For ComfyUI the file in a folder is called as the adapter is, so a name
        that leads out of it, such as "../ink", is a `RequestError`.
        """
        with self._turn:
            self._attachments.require([name])
            adapter = self._attachments[name]
        return save_adapter(adapter, target, name=name, naming=naming, overwrite=overwrite)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> AdapterReport:
        """`load_adapter` as diffusers calls it: without a name it is "default_0" and so on.

        As there, the first one acts, and those after it once `set_adapters` says so.
        """
        free = (f"default_{number}" for number in range(len(self._strengths) + 1))
        return self.load_adapter(
            pretrained_model_name_or_path_or_dict,
            next(name for name in free if name not in self._strengths) if adapter_name is None else adapter_name,
            strength=0.0 if self._strengths else 1.0,
            weight_name=weight_name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )

    def unload_lora_weights(self) -> None:
        """Take all adapters off."""
        self.delete_adapters(list(self._strengths))

    def get_active_adapters(self) -> list[str]:
        """Names of those that act in pictures that do not say otherwise."""
        return [name for name, value in self._strengths.items() if value]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all, by what they are attached to."""
        return {"transformer": list(self._strengths)} if self._strengths else {}

    def disable_lora(self) -> None:
        """Let no adapter act in pictures that do not say otherwise, until `enable_lora` or `set_adapters`."""
        with self._turn:
            self._set_aside |= {name: value for name, value in self._strengths.items() if value}
            self._strengths = dict.fromkeys(self._strengths, 0.0)

    def enable_lora(self) -> None:
        """Let those act again that acted before `disable_lora`, as strong as they did."""
        with self._turn:
            self._strengths |= {name: one for name, one in self._set_aside.items() if self._strengths.get(name) == 0}
            self._set_aside = {}

    def fuse_lora(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: what is merged into rounded weights cannot be taken out again to the bit."""
        raise RequestError(
            "adapters are computed beside the weights and never merged into them, so that they can be taken off; leave "
            "fuse_lora and unfuse_lora out, and where lora_scale was given, pass that to set_adapters"
        )

    unfuse_lora = fuse_lora

    def close(self) -> None:
        """Take all adapters off and let go of the models; the pipeline cannot be used afterwards.

        Modules that were handed in are what they were before. `with` does it at the end of its block.
        """
        with self._turn:
            self._attachments.close()
            self._strengths = {}
            super().close()
            self._account()

    def _with_adapters(self, request: AnyRequest) -> AnyRequest:
        """`request` with the strengths that are set, where it has none of its own; `AdapterError` for unknown names."""
        if isinstance(request, GenerationRequest) and request.adapters is None:
            return replace(request, adapters=self.adapters) if self._strengths else request
        names = dict(request.adapters) if isinstance(request, ResolvedRequest) else request.adapters
        if isinstance(names, Mapping):
            self._attachments.require(list(names))
        return request

    def _scaled(self, adapters: Mapping[str, float] | None, options: Mapping[str, Any]) -> dict[str, float]:
        """The strengths of a call that says diffusers' `joint_attention_kwargs`."""
        if not self._strengths:
            raise RequestError("joint_attention_kwargs scales adapters and none is attached; leave it out")
        if not isinstance(options, Mapping) or set(options) != {"scale"}:
            raise RequestError(f"joint_attention_kwargs can be {{'scale': a number}}, got {shown(options)}")
        scale = checked_strength("the scale in joint_attention_kwargs", options["scale"])
        return {
            name: value * scale for name, value in resolve_adapters(self.adapters if adapters is None else adapters)
        }

    def _require_adapters(self, recipe: Recipe) -> None:
        """Raises `AdapterError` where a recipe's adapters are not loaded, or are others."""
        for name, said in recipe.adapters.items():
            known = self._attachments[name].digest if name in self._attachments.names else None
            if known != said["digest"]:
                found = "is not loaded" if known is None else f"is another file here (SHA-256 {known[:12]}...)"
                raise AdapterError(
                    f"the picture was made with the adapter {name!r} from {brief(said['source'])!r} (SHA-256 "
                    f"{said['digest'][:12]}...), which {found}; load that with load_adapter(..., name={name!r})"
                )

    @contextmanager
    def _computing(self, adapters: Picked = ()) -> Iterator[None]:
        """One thread at a time, and within it these adapters act and no others."""
        with super()._computing(), self._attachments.using(adapters):
            yield

    @property
    def _attached_bytes(self) -> int:
        """What is on the device beside this model."""
        return self._attachments.bytes

    @property
    def _beside(self) -> dict[str, int]:
        """What is on the device beside the models, as `ModelSizes` counts it."""
        return {"adapters": sum(one._attached_bytes for one in self._sharing)}

    @property
    def _sharing(self) -> list[Adapted]:
        """The models that were planned for one amount of memory: this one, and in a pair the other, if it is there."""
        found = (one() for one in self._pair)
        return [self, *(one for one in found if one is not None)]

    def _make_room(self, name: str) -> None:
        """Count what is attached in the plan, and in that of a model beside; where it does not fit, more of the model
        passes through the device than before.

        What was moved stays so if the rest fails; whoever then lets go of what is attached lets the plans count again.
        Recordings, which no plan counts, are let go of before anything is refused for them.
        """
        for one in self._sharing:
            one._forget_graphs()
        before = [(one, one._plan) for one in self._sharing if one._plan is not None]
        try:
            plans = [
                with_adapters(plan, **one._beside, has_files=one._residency.read is not None) for one, plan in before
            ]
            for (one, old), plan in zip(before, plans, strict=True):
                if plan.placement != old.placement:
                    said = f"{name} needed room; since then: {plan.placement}"
                    one._move(replace(plan, stepped_down=(*old.stepped_down, said)), one.device)
                else:
                    one._plan = plan
        except NotEnoughMemory as error:
            raise NotEnoughMemory(
                f"{name} does not fit: {error}; load the model with more memory, or delete other adapters"
            ) from error

    def _account(self) -> None:
        """Let the plans, where there are some, count what is attached."""
        for one in self._sharing:
            if one._plan is not None:
                one._plan = one._planned()

    def _planned(self) -> Plan:
        plan = super()._planned()
        beside: dict[str, Any] = self._beside
        sizes = replace(plan.sizes, **beside)
        return plan if sizes == plan.sizes else follow(plan, sizes, plan.work.dtype)

    def _move(self, plan: Plan, device: torch.device) -> None:
        super()._move(plan, device)
        self._refresh()

    def _refresh(self) -> None:
        """Bring what is attached to where the models are now, in their type."""
        self._attachments.refresh()


def _names(given: Any) -> list[str]:
    """One name of an adapter, or several, as a list."""
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise RequestError(f"adapter_names must be a name, or a list of names, of adapters; got {shown(wrong[0])}")
    return names
