"""What a pipeline is made of, before any picture: loaded, taken from diffusers, moved, saved.

Knows nothing of steps or pixels; where the models sit in memory is `placed`'s.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import components, runtime
from .checkpoint.configs import read_schedule
from .checkpoint.inspect import fingerprint
from .checkpoint.load import Components, load_components
from .checkpoint.locate import Location, locate
from .checkpoint.save import save_components
from .controlled import Controlled
from .errors import RequestError, ZImageWarning
from .files.recipe import FILE_KEYS
from .memory.budget import find_budget, held_memory
from .memory.ladder import with_less
from .memory.plan import Plan, parse_memory
from .memory.planner import EXACT, Planning, check_weights, follow, plan_model
from .memory.sizes import ModelSizes
from .models import attention
from .models.autoencoder import Autoencoder
from .models.precision import cast, choose_dtype
from .models.quantized import widening
from .models.text_encoder import TextEncoder, without_last_layer
from .models.transformer import ZImageTransformer
from .own import OwnRecipe
from .rules import Limits
from .variants import detect_variant

if TYPE_CHECKING:
    from typing import Self

_CAPTION_TOKENS = 128
"""Of a prompt of some length, beside which attention is measured."""
_UNKNOWN_MODEL = {"source": "", "revision": "", "fingerprint": "", **dict.fromkeys(FILE_KEYS, "")}


class Parts(Controlled):
    """What a pipeline holds: the three models, the tokenizer, the variant and the shift."""

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        transformer: Any,
        *,
        variant: str | None = None,
        sampler: str | None = None,
        guidance_scale: float | None = None,
        model: Mapping[str, str] | None = None,
        folder: Path | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> None:
        self.shift = components.shift_of(scheduler)
        self.model = {**_UNKNOWN_MODEL, **(model or {})}
        detected = detect_variant(variant=variant, hub_id=self.model["source"], shift=self.shift)
        own = OwnRecipe(sampler=sampler, guidance_scale=guidance_scale)
        self.variant = components.drawn_with(detected, own, scheduler)
        self._folder, self._files = folder, dict(files or {})
        inner = without_last_layer(text_encoder)
        components.check_parts(inner.config, transformer.config, vae.config)
        super().__init__(TextEncoder(inner, tokenizer), ZImageTransformer.share(transformer), Autoencoder(vae))

    def __repr__(self) -> str:
        try:
            state = f"{self.device}, {str(self.dtype).removeprefix('torch.')}"
        except RequestError:
            state = "closed"
        return f"<{type(self).__name__}: {self.variant.name} from {self.model['source'] or 'parts'}, {state}>"

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        transformer: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        vae: str | os.PathLike[str] | None = None,
        controlnet: str | os.PathLike[str] | torch.nn.Module | None = None,
        variant: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        memory: str | int | Plan = "auto",
        weight_dtype: str | None = None,
        quantize_activations: bool = False,
        attention_backend: str = "auto",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        torch_dtype: str | torch.dtype | None = None,
        low_cpu_mem_usage: bool | None = None,
    ) -> Self:
        """Load a checkpoint in the Hugging Face layout.

        Args:
            model: "base", "turbo", a hub id, a folder, or "demo" and "demo-turbo", small models that come with the
                package. Or the file of a transformer, as below; then `variant` says which model all else is from.
            transformer, text_encoder, vae: a safetensors or GGUF file with the weights of that, here or on the hub
                ("owner/name/file.gguf"), instead of those of `model`, whichever tool wrote it. Layers that are in fewer
                bits in the file, GGUF or fp8, stay so.
            controlnet: what `load_controlnet` then loads.
            variant: "base" or "turbo", where neither the hub id nor the scheduler's shift tells.
            dtype: "auto" (the default), "bfloat16", "float16", "float32" or the torch dtype; `torch_dtype` is the same.
            device: by default CUDA, MPS or the CPU, the first there is.
            memory: of the device, how much may be used: "auto" is what is free, "16GB" or "12GiB" no more than that.
                What does not fit passes through, layer by layer; see `plan`. Or a plan of one's own.
            weight_dtype: what the layers' weights are stored as: "int8", "float8" or "nf4" take a half or a quarter of
                the memory and change the picture somewhat; "bfloat16" halves that of float32 and is widened as it is
                used; "full" is the dtype. Left out, it is int8 where nothing else fits, with a warning, before that
                bfloat16 where the files are, which changes nothing, and full otherwise.
            quantize_activations: with weight_dtype "int8" or "float8", whether the transformer's layers round what they
                multiply to that too, token by token, and multiply in 8 bits where the device does. The picture changes
                somewhat more; where the device does not, it is slower than weight_dtype alone, and a warning says so.
            attention_backend: as for `set_attention_backend`.
            revision, cache_dir, token, local_files_only: as for huggingface_hub, whose environment variables count.
            low_cpu_mem_usage: accepted for diffusers' scripts; loading is always tensor by tensor.

        Raises `CheckpointError` for what cannot be found, read or trusted, `NotEnoughMemory` before loading for what
        cannot fit, `RequestError` for wrong arguments.
        """
        if dtype is not None and torch_dtype is not None:
            raise RequestError("dtype and torch_dtype are both given; they are one setting, leave torch_dtype out")
        if not isinstance(memory, Plan):
            parse_memory(memory)
        elif weight_dtype is not None or quantize_activations:
            raise RequestError(
                "memory is a plan, which says what weights are stored as; leave weight_dtype and "
                "quantize_activations out"
            )
        check_weights(weight_dtype, quantize_activations)
        target = runtime.choose_device(device)
        precision = choose_dtype(dtype or torch_dtype or "auto", target)
        attention.check_works(attention_backend, target, precision)
        place = locate(
            model,
            transformer=transformer,
            text_encoder=text_encoder,
            vae=vae,
            variant=variant,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        shift, own = read_schedule(place.folder)
        own.applied_to(detect_variant(variant=variant, hub_id=place.hub_id, shift=shift))  # asks before loading
        before = held_memory(target)
        asked: dict[str, Any] = {"weights": weight_dtype, "quantize_activations": quantize_activations}
        make = partial(_plan, memory=memory, dtype=precision, device=target, asked=asked)
        planning = Planning(make)
        load = partial(
            load_components,
            place.folder,
            dtype=precision,
            device=target,
            planner=planning,
            files=place.files,
        )
        parts = with_less(load, planning.step_down)
        made = cls(
            parts.shift,
            parts.vae,
            parts.text_encoder,
            parts.tokenizer,
            parts.transformer,
            variant=variant,
            sampler=parts.own.sampler,
            guidance_scale=parts.own.guidance_scale,
            model=described(place),
            folder=place.folder,
            files=place.files,
        )
        made._follow(parts, target, before)
        if weight_dtype is None and parts.plan is not None and not isinstance(memory, Plan):
            warn_of_weights(parts.plan)
        _warn_of_widening(parts.transformer, target)
        if attention_backend != attention.AUTO:
            made.set_attention_backend(attention_backend)
        if controlnet is not None:
            made.load_controlnet(controlnet, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        return made

    @classmethod
    def from_diffusers(cls, pipeline: Any, *, variant: str | None = None) -> Self:
        """A pipeline over the very modules of a diffusers `ZImagePipeline`, its ControlNet included if it has one."""
        made = cls(**components.parts_of(pipeline), variant=variant)
        if getattr(pipeline, "controlnet", None) is not None:
            made.load_controlnet(pipeline.controlnet)
        return made

    def to_diffusers(self) -> Any:
        """A diffusers `ZImagePipeline` over the very modules of this one; `RequestError` if some are streamed.

        It lacks what zimage does not load, the text encoder's last layer, so its `save_pretrained` is refused.
        """
        self._require_resident("handed to diffusers")
        return components.to_diffusers(
            vae=self.autoencoder.vae,
            text_encoder=self.text_encoder.model,
            tokenizer=self.text_encoder.tokenizer,
            transformer=self.transformer,
            shift=self.shift,
            own=OwnRecipe.of(self.variant),
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
            own=OwnRecipe.of(self.variant),
            files=self._files,
        )
        self._require_plain("saved")
        with self._turn:
            save_components(parts, folder, max_shard_size=max_shard_size)

    def to(self, *targets: Any, device: Any = None, dtype: Any = None) -> Self:
        """Move to a device, a dtype or both, as `torch.nn.Module.to` does; returns the pipeline itself. Names will do.

        `RequestError` if parts of it are streamed.
        """
        for target in targets:
            named = getattr(torch, target, None) if isinstance(target, str) else target
            if isinstance(named, torch.dtype):
                dtype = named
            else:
                device = target
        place = self.device if device is None else runtime.choose_device(device)
        precision = self.dtype if dtype is None else choose_dtype(dtype, place)
        if place == self.device and precision == self.dtype:
            return self
        self._require_resident("moved or converted")
        self._require_plain("moved or converted")
        with self._turn:
            self._forget_graphs()
            for module in (self.text_encoder.model, self.transformer, self.autoencoder.vae):
                cast(module, dtype=precision, device=place)
            self._refresh()
            self.text_encoder.forget()
        return self

    def set_attention_backend(self, backend: str = "auto") -> None:
        """Run attention with another backend; pictures differ by its rounding, and their recipes name it.

        Args:
            backend: "auto" is FlashAttention-3 where it is installed on a card that it was made for, and torch's choice
                elsewhere. "fastest" measures the exact ones at the model's own size of picture. "float8" multiplies all
                in 8 bits, on Hopper's cards. Or one of diffusers by name, such as
                "_native_cudnn", "flash" or "sage", which rounds queries and keys to 8 bits.

        Raises `RequestError` for one that there is not, that downloads code, or that does not work here.
        """
        config, limits = self.transformer.config, self.limits
        with self._turn:
            if backend == attention.AUTO:
                self.transformer.__dict__.pop("attend", None)
                return
            tokens = (limits.native_side // limits.size_multiple) ** 2 + _CAPTION_TOKENS
            sizes = tokens, config.n_heads, config.dim // config.n_heads
            name = attention.choose(backend, *sizes, self.device, self.dtype)
            self.transformer.attend = attention.attend_with(name)

    @property
    def limits(self) -> Limits:
        """What the loaded model can take, read from its configuration."""
        return components.limits_of(self.transformer.config, self.autoencoder.vae.config)


def _plan(
    sizes: ModelSizes, *, memory: str | int | Plan, dtype: torch.dtype, device: torch.device, asked: dict[str, Any]
) -> Plan:
    """The plan for pictures of the size that the model was trained on, or the one that was given."""
    precision = str(dtype).removeprefix("torch.")
    if isinstance(memory, Plan):
        return follow(memory, sizes, precision)
    return plan_model(sizes, precision, find_budget(memory, device), **asked)


def described(place: Location) -> dict[str, str]:
    """The model that was loaded, as recipes name it."""
    files = {part: place.names.get(part) or runtime.portable_path(file) for part, file in place.files.items()}
    return {
        "source": place.hub_id or place.demo or runtime.portable_path(place.folder),
        "revision": place.revision or "",
        "fingerprint": fingerprint(place.folder, place.files),
        **dict.fromkeys(FILE_KEYS, ""),
        **files,
    }


def warn_of_weights(plan: Plan) -> None:
    """Where the plan alone decided that weights are stored in fewer bits."""
    if plan.placement.weights in (None, EXACT):
        return
    warnings.warn(
        f"the weights do not fit in {plan.budget.name or 'the memory'} in {plan.work.dtype}, so they are stored in "
        f"{plan.placement.weights}, which changes pictures somewhat; weight_dtype='full' refuses instead, "
        f"weight_dtype={plan.placement.weights!r} says that it is meant",
        ZImageWarning,
        stacklevel=3,
    )


def _warn_of_widening(transformer: ZImageTransformer, device: torch.device) -> None:
    """Where activations are rounded and then widened again, which only costs time."""
    widened, rounding = widening(transformer, transformer.compute_dtype, device)
    if widened:
        warnings.warn(
            f"{widened} of {rounding} layers that round activations widen them again on {device}, which has no product "
            "of 8-bit numbers for them; that is slower than without quantize_activations=True",
            ZImageWarning,
            stacklevel=3,
        )
