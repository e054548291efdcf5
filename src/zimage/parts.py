"""What a pipeline is made of, before any picture: loaded, taken from diffusers, moved, saved.

`Parts` owns the models and the one lock that orders their use. Knows nothing of requests, steps or pixels.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import components, runtime
from .checkpoint.configs import read_shift
from .checkpoint.inspect import fingerprint
from .checkpoint.load import Components, load_components
from .checkpoint.locate import locate
from .checkpoint.save import save_components
from .errors import RequestError
from .memory.budget import find_budget
from .memory.plan import Plan, fit_picture, follow, parse_memory, plan_model
from .memory.residency import Residency
from .memory.sizes import ModelSizes
from .models.autoencoder import Autoencoder
from .models.precision import cast, choose_dtype
from .models.text_encoder import TextEncoder, without_last_layer
from .models.transformer import ZImageTransformer
from .request import ResolvedRequest
from .rules import Limits
from .variants import detect_variant

if TYPE_CHECKING:
    from typing_extensions import Self

_UNKNOWN_MODEL = {"source": "", "revision": "", "fingerprint": ""}


class Parts:
    """What a pipeline holds: the three models, the tokenizer, the variant and the shift, and one lock for their use."""

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        transformer: Any,
        *,
        variant: str | None = None,
        model: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.shift = components.shift_of(scheduler)
        self.model = {**_UNKNOWN_MODEL, **(model or {})}
        self.variant = detect_variant(variant=variant, hub_id=self.model["source"], shift=self.shift)
        self.text_encoder = TextEncoder(without_last_layer(text_encoder), tokenizer)
        self.transformer = ZImageTransformer.share(transformer)
        self.autoencoder = Autoencoder(vae)
        self._folder = folder
        self._plan: Plan | None = None
        self._residency: Residency | None = None
        self._turn = threading.RLock()
        components.check_parts(self.text_encoder.model.config, self.transformer.config, vae.config)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        variant: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        memory: str | int | Plan = "auto",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        torch_dtype: str | torch.dtype | None = None,
        low_cpu_mem_usage: bool | None = None,
    ) -> Self:
        """Load a checkpoint in the Hugging Face layout.

        Args:
            model: "base", "turbo", a hub id, a folder, or "demo", a small model that comes with the package.
            variant: "base" or "turbo", where neither the hub id nor the scheduler's shift tells.
            dtype: "auto" (the default), "bfloat16", "float16", "float32" or the torch dtype; `torch_dtype` is the same.
            device: by default CUDA, MPS or the CPU, the first there is.
            memory: of the device, how much may be used: "auto" is what is free, "16GB" or "12GiB" no more than that.
                What does not fit passes through, layer by layer; see `plan`. Or a plan of one's own.
            revision, cache_dir, token, local_files_only: as for huggingface_hub, whose environment variables count.
            low_cpu_mem_usage: accepted for diffusers' scripts; loading is always tensor by tensor.

        Raises `CheckpointError` for what cannot be found, read or trusted, `NotEnoughMemory` before loading for what
        cannot fit, `RequestError` for wrong arguments.
        """
        if dtype is not None and torch_dtype is not None:
            raise RequestError("dtype and torch_dtype are both given; they are one setting, leave torch_dtype out")
        if not isinstance(memory, Plan):
            parse_memory(memory)
        target = runtime.choose_device(device)
        precision = choose_dtype(dtype or torch_dtype or "auto", target)
        place = locate(model, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        detect_variant(variant=variant, hub_id=place.hub_id, shift=read_shift(place.folder))  # asks before loading
        planner = partial(_plan, memory=memory, dtype=precision, device=target)
        parts = load_components(place.folder, dtype=precision, device=target, planner=planner)
        source = place.hub_id or place.demo or runtime.portable_path(place.folder)
        made = cls(
            parts.shift,
            parts.vae,
            parts.text_encoder,
            parts.tokenizer,
            parts.transformer,
            variant=variant,
            model={"source": source, "revision": place.revision or "", "fingerprint": fingerprint(place.folder)},
            folder=place.folder,
        )
        made._carry_out(parts, target)
        return made

    @property
    def plan(self) -> Plan | None:
        """What sits where, as predicted for a picture of the model's own size; `None` where nothing was loaded."""
        return self._plan

    def _fit(self, request: ResolvedRequest) -> int:
        """How many of the decoder's levels a picture needs in strips; raises `NotEnoughMemory` if it does not fit."""
        if self._plan is None:
            return 0
        fitted = fit_picture(self._plan, request.height, request.width, request.max_sequence_length)
        return fitted.placement.strip_levels

    @classmethod
    def from_diffusers(cls, pipeline: Any, *, variant: str | None = None) -> Self:
        """A pipeline over the very modules of a diffusers `ZImagePipeline`."""
        return cls(**components.parts_of(pipeline), variant=variant)

    def to_diffusers(self) -> Any:
        """A diffusers `ZImagePipeline` over the very modules of this one; `RequestError` if some are streamed."""
        self._require_resident("handed to diffusers")
        return components.to_diffusers(
            vae=self.autoencoder.vae,
            text_encoder=self.text_encoder.model,
            tokenizer=self.text_encoder.tokenizer,
            transformer=self.transformer,
            shift=self.shift,
        )

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_size: str | int = "5GB") -> None:
        """Write the checkpoint in the Hugging Face layout, whole or not at all; `folder` must be new or empty."""
        parts = Components(
            tokenizer=self.text_encoder.tokenizer,
            text_encoder=self.text_encoder.model,
            text_encoder_layers=self.text_encoder.model.config.num_hidden_layers + 1,
            transformer=self.transformer,
            vae=self.autoencoder.vae,
            shift=self.shift,
            folder=self._folder,
        )
        with self._turn:
            save_components(parts, folder, max_shard_size=max_shard_size)

    def to(self, *targets: Any, device: Any = None, dtype: Any = None) -> Self:
        """Move to a device, a dtype or both, as `torch.nn.Module.to` does; returns the pipeline itself.

        `RequestError` if parts of it are streamed.
        """
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target
        place = self.device if device is None else runtime.choose_device(device)
        precision = self.dtype if dtype is None else choose_dtype(dtype, place)
        if place == self.device and precision == self.dtype:
            return self
        self._require_resident("moved or converted")
        with self._turn:
            for module in (self.text_encoder.model, self.transformer, self.autoencoder.vae):
                cast(module, dtype=precision, device=place)
            self.text_encoder.forget()
        return self

    def _carry_out(self, loaded: Components, device: torch.device) -> None:
        """Let what the plan streams pass through `device`."""
        self._plan = loaded.plan
        placement = loaded.plan.placement if loaded.plan else None
        if placement is not None and placement.text_encoder == "streamed":
            self.text_encoder.device = device
        if placement is not None and loaded.layers:
            self._residency = Residency(
                placement, loaded.layers, device, text_encoder=self.text_encoder.model, transformer=self.transformer
            )

    def _require_resident(self, what: str) -> None:
        if self._residency is not None:
            raise RequestError(
                f"parts of this pipeline pass through the device as its plan has it, so it cannot be {what}; load it "
                "again with the device, dtype and memory that are wanted"
            )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """One thread at a time, without gradients, and in the pipeline's own precision whatever autocast is around."""
        device = self.device.type
        with self._turn, torch.no_grad(), torch.autocast(device, enabled=False):
            yield

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.x_pad_token.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return self.transformer.compute_dtype

    @property
    def limits(self) -> Limits:
        """What the loaded model can take, read from its configuration."""
        return components.limits_of(self.transformer.config, self.autoencoder.vae.config)


def _plan(sizes: ModelSizes, *, memory: str | int | Plan, dtype: torch.dtype, device: torch.device) -> Plan:
    """The plan for pictures of the size that the model was trained on, or the one that was given."""
    precision = str(dtype).removeprefix("torch.")
    if isinstance(memory, Plan):
        return follow(memory, sizes, precision)
    return plan_model(sizes, precision, find_budget(memory, device))
