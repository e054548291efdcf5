"""A ControlNet that fits a model: checked before a value is read, then loaded, or shared from diffusers' own object.

Finding its files is `controlsource`'s, computing with it `models.control`'s. Every failure is an `AdapterError`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from torch import nn

from ..checkpoint.inspect import content_digest
from ..checkpoint.modules import build as blank
from ..checkpoint.reading import shown
from ..checkpoint.shards import Weights, match
from ..checkpoint.tensors import fill
from ..errors import AdapterError
from ..memory.sizes import ITEMSIZE
from ..models.control import PARTS, build, share
from .controlsource import CLASS, REFINED, TWICE, ControlPlace, locate_controlnet, read_description
from .source import as_adapter_error

_ARGUMENTS = (
    "control_layers_places", "control_refiner_layers_places", "control_in_dim", "add_control_noise_refiner",
    "all_patch_size", "all_f_patch_size", "dim", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps", "qk_norm",
)  # fmt: skip
_SAMPLE = 256
"""Numbers at the beginning and at the end of each tensor in memory that its identity covers."""


@dataclass(frozen=True, eq=False)
class ControlNet:
    """A ControlNet in memory: `source` is what it is remembered to be from, `digest` a sampled identity of it."""

    net: ZImageControlNetModel = field(repr=False)
    source: str
    digest: str

    @property
    def bytes(self) -> int:
        """What its weights take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.net.parameters())

    def __str__(self) -> str:
        layers, channels = len(self.net.control_layers), self.net.control_in_dim
        return f"{self.source}: {layers} control layers, {channels} channels, {self.bytes / 2**30:.2f} GiB"


@dataclass(frozen=True, eq=False, kw_only=True)
class Found:
    """A ControlNet that fits, not loaded yet: what it is called, its numbers of parameters and of blocks."""

    name: str
    parameters: int
    blocks: int
    load: Callable[[torch.dtype, torch.device, str], ControlNet]
    """In a type, to a device, remembered by a source."""
    place: ControlPlace | None = None

    def beside(self, dtype: str) -> dict[str, int]:
        """What it takes on the device in a precision, as `ModelSizes` counts it."""
        return {"adapters": self.parameters * ITEMSIZE[dtype], "control_blocks": self.blocks}


def find_controlnet(
    source: str | os.PathLike[str] | nn.Module, transformer: Mapping[str, Any], **options: Any
) -> Found:
    """The ControlNet that `source` means, for a transformer with this config; `options` as for `locate_controlnet`.

    Raises `AdapterError` for what cannot be found, is damaged, or was made for another architecture or other sizes.
    """
    if isinstance(source, nn.Module):
        if options.get("weight_name") is not None:
            raise AdapterError("weight_name is about a folder or a repository, and a model was given; leave it out")
        return _in_memory(source, transformer)
    with as_adapter_error():
        place = locate_controlnet(source, **options)
        config, weights = read_description(place, transformer)
        _require_fit(config, transformer, place.name)
        net = build(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
        match(place.path, "controlnet", weights, shapes, {})
        return Found(
            name=place.name,
            parameters=sum(tensor.numel() for tensor in net.parameters()),
            blocks=_blocks(net),
            load=partial(_load, place, config, weights),
            place=place,
        )


def released_transformer() -> dict[str, Any]:
    """The config of the released models' transformer, for which diffusers' class has the defaults."""
    return dict(blank("transformer", {}, ()).module.config)


def _load(
    place: ControlPlace, config: dict[str, Any], weights: Weights, dtype: torch.dtype, device: torch.device, source: str
) -> ControlNet:
    with as_adapter_error(), torch.inference_mode(False):
        net = build(config)
        targets = {name: name for name in net.state_dict()}
        fill(net, weights, targets, dtype=dtype, device=device)
        # In files without a config 2.0 and 2.1 differ in this alone: in 2.0 the refiner's blocks were not trained.
        guessed = place.config is None and config["add_control_noise_refiner"] == REFINED
        if guessed and not bool(net.control_noise_refiner[0].before_proj.weight.any()):
            net.add_control_noise_refiner, net.control_noise_refiner = TWICE, None
        return ControlNet(net, source, content_digest(weights))


def _in_memory(module: nn.Module, transformer: Mapping[str, Any]) -> Found:
    if not isinstance(module, ZImageControlNetModel):
        raise AdapterError(f"a ControlNet for Z-Image is diffusers' {CLASS}, got {type(module).__name__}")
    config = {name: module.config[name] for name in _ARGUMENTS}
    config["control_refiner_layers_places"] = config["control_refiner_layers_places"] or []
    _require_fit(config, transformer, f"the {CLASS}")
    own = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(PARTS)}
    damaged = [name for name, tensor in own.items() if tensor.is_meta or not bool(tensor.isfinite().all())]
    if damaged:
        raise AdapterError(f"the {CLASS}: {damaged[0]} has no values, or some that are NaN or infinite; load it again")

    def load(dtype: torch.dtype, device: torch.device, source: str) -> ControlNet:
        return ControlNet(share(module, config, dtype, device), source, digest.hexdigest())

    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name in sorted(own):
        flat = own[name].detach().reshape(-1)
        digest.update(f"{name} {tuple(own[name].shape)}\0".encode())
        digest.update(torch.cat([flat[:_SAMPLE], flat[-_SAMPLE:]]).float().cpu().numpy().tobytes())
    parameters = sum(tensor.numel() for tensor in own.values())
    return Found(name=f"the {CLASS}", parameters=parameters, blocks=_blocks(module), load=load)


def _blocks(net: ZImageControlNetModel) -> int:
    return len(net.control_layers) + len(net.control_noise_refiner or ())


def _require_fit(config: Mapping[str, Any], transformer: Mapping[str, Any], name: str) -> None:
    """Raises `AdapterError` where the ControlNet was made for a transformer of other sizes, or contradicts itself."""
    problems = [
        f"its {key} is {config[key]}, the transformer's {transformer[key]}"
        for key in ("dim", "n_heads", "n_kv_heads")
        if config[key] != transformer[key]
    ]
    layers, refined = list(config["control_layers_places"]), list(config["control_refiner_layers_places"])
    for places, key in ((layers, "n_layers"), (refined, "n_refiner_layers")):
        if places and max(places) >= transformer[key]:
            problems.append(f"it adds to layer {max(places)}, the transformer has {transformer[key]} ({key})")
    if layers[:1] != [0] or layers != sorted(set(layers)):
        problems.append(f"its control_layers_places must ascend from 0, got {shown(layers)}")
    hints = {REFINED: config["n_refiner_layers"], TWICE: len(layers)}.get(config["add_control_noise_refiner"])
    if hints is not None and not 1 <= max(1, len(refined)) <= hints:
        problems.append(f"it has {hints} blocks for control_refiner_layers_places {shown(refined)}")
    if config["control_in_dim"] < transformer["in_channels"]:
        problems.append(f"its control_in_dim is {config['control_in_dim']}, latents have {transformer['in_channels']}")
    if problems:
        raise AdapterError(
            f"{name} does not fit this transformer: {'; '.join(problems)}; take a ControlNet for this model"
        )
