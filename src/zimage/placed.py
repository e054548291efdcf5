"""The models of a pipeline and where they sit: its plan, the rungs below it, diffusers' names for those, and the end.

`Placed` owns the models and the turn that orders their use. Knows of a request only its size and its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from . import runtime
from .checkpoint.load import Components
from .checkpoint.sizes import sizes_of_models
from .errors import NotEnoughMemory, RequestError
from .hires import demands
from .memory.budget import find_budget, peak_memory
from .memory.ladder import Attempt, is_out_of_memory, release, with_less
from .memory.plan import Plan
from .memory.planner import SLOTS, everything_resident, fit_picture, fits_beside, follow, lower, require_fit
from .memory.residency import Residency
from .memory.sizes import STORED_BYTES
from .models import attention
from .models.autoencoder import Autoencoder
from .models.compiled import compile_blocks, computes_compiled, is_compiled, restore_blocks
from .models.graphs import drop_graphs, forget_graphs, use_graphs
from .models.quantized import packed_as
from .models.text_encoder import TextEncoder
from .models.transformer import ZImageTransformer
from .request import ResolvedRequest
from .rules import shown
from .turns import Turn

if TYPE_CHECKING:
    from typing import Self

_MODELS = ("text_encoder", "transformer", "autoencoder")
_COMPONENTS = ("text_encoder", "transformer", "vae", "controlnet")
"""What diffusers calls the parts that a device holds."""


class Placed:
    """The three models of a pipeline, where they sit, and the turn at their use."""

    text_encoder: TextEncoder
    transformer: ZImageTransformer
    autoencoder: Autoencoder

    def __init__(self, text_encoder: TextEncoder, transformer: ZImageTransformer, autoencoder: Autoencoder) -> None:
        # Modules that whoever shares a model shares too, whatever stands around them.
        self._turn = Turn(text_encoder.model.embed_tokens, transformer.layers, autoencoder.vae)
        self.text_encoder, self.transformer, self.autoencoder = text_encoder, transformer, autoencoder
        self._residency = Residency(text_encoder.model, transformer)
        self._plan: Plan | None = None
        self._least_strips = 0
        self._compiles = False
        self._held_before: int | None = None

    @property
    def plan(self) -> Plan | None:
        """What sits where and the predicted peaks for a picture of the model's own size, beside what was measured.

        `None` for parts that were handed in, until memory runs out or an `enable_` method plans.
        """
        if self._plan is None:
            return None
        plan = replace(self._plan, attention=self.attention_backend)
        peak = None if self._held_before is None else peak_memory(self.device)
        return plan if peak is None else replace(plan, measured=max(0, peak - (self._held_before or 0)))

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.x_pad_token.device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return self.transformer.compute_dtype

    @property
    def weights(self) -> str | None:
        """What layers are stored as: "bfloat16", "int8", "float8", "nf4", as in files "gguf", "fp8"; `None` in full."""
        if self._plan is None or self._plan.placement.weights:
            return self._plan.placement.weights if self._plan else None
        return packed_as(self.text_encoder.model, self.transformer) if self._plan.sizes.packed else None

    @property
    def activations(self) -> str | None:
        """What the transformer's layers round their input to: "int8" or "float8"; `None` if they do not."""
        return self.weights if self._plan is not None and self._plan.placement.quantize_activations else None

    @property
    def attention_backend(self) -> str:
        """What attention runs with, by diffusers' names; "native" is torch's own choice among its kernels."""
        return attention.name_of(self.transformer, self.device, self.dtype)

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device | None = None) -> None:
        """Let the text encoder pass through the device, layer by layer, for each new prompt; the transformer stays.

        As in diffusers the device is the one given, or CUDA. What passes through waits in the host's memory, or where
        the device is the CPU in the checkpoint's files. `RequestError` where there is nothing to wait in.
        """
        self._offload(runtime.numbered_device(gpu_id, device), text_encoder="streamed")

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Let the layers of text encoder and transformer pass through the device: the least memory, the most time."""
        self._offload(
            runtime.numbered_device(gpu_id, device), text_encoder="streamed", resident_blocks=0, context_resident=False
        )

    def enable_group_offload(
        self,
        onload_device: str | torch.device | None = None,
        offload_device: str | torch.device = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
        exclude_modules: str | Collection[str] | None = None,
    ) -> None:
        """As `enable_sequential_cpu_offload`, but for `exclude_modules` ("text_encoder", "transformer"; "vae" and
        "controlnet" always stay).

        With `offload_to_disk_path` layers wait in the checkpoint's own files, and nothing is written there. Layers
        always move one by one, ahead of their use, so the other settings of diffusers decide nothing.
        """
        if runtime.named_device(offload_device).type != "cpu":
            raise RequestError(f"offload_device must be the CPU, got {offload_device!r}")
        kept = (exclude_modules,) if isinstance(exclude_modules, str) else exclude_modules or ()
        if not isinstance(kept, Collection) or any(name not in _COMPONENTS for name in kept):
            raise RequestError(f"exclude_modules must be out of {', '.join(_COMPONENTS)}; got {shown(exclude_modules)}")
        changes: dict[str, Any] = {}
        if "text_encoder" not in kept:
            changes |= {"text_encoder": "streamed"}
        if "transformer" not in kept:
            changes |= {"resident_blocks": 0, "context_resident": False}
        if offload_to_disk_path is not None:
            changes |= {"text_source": "files", "block_source": "files"}
        self._offload(onload_device, **changes)

    def enable_vae_tiling(self) -> None:
        """Decode in strips, at least the finest level: half of the memory or less, in more time (see the guide)."""
        self._least_strips = 1

    def disable_vae_tiling(self) -> None:
        """Decode whole again, where that fits."""
        self._least_strips = 0

    def enable_vae_slicing(self) -> None:
        """Nothing to do: pictures are always decoded one at a time."""

    disable_vae_slicing = enable_vae_slicing

    @property
    def compiled(self) -> bool:
        """Whether the transformer's block is compiled, or will be: `compile` was called, compiling did not fail, and no
        kernels of the library compute it."""
        return computes_compiled(self.transformer)

    def compile(self, cuda_graphs: bool = False) -> Self:
        """Let torch compile the transformer's block when it is first used: once, for all blocks, sizes and prompts.

        Where the library's kernels compute the block (CUDA with Triton), faster than what torch makes of it, they go on
        and nothing changes. Elsewhere pictures are the same within rounding, and from run to run to the bit. Where
        compiling fails, a warning says why and all goes on uncompiled; `RequestError` where torch has no compiler.
        Returns the pipeline itself; a second call changes nothing.

        With `cuda_graphs` prompts, and steps of up to 5120 tokens in all (1024 x 1024 pixels and the prompt), are
        recorded once for each size and 32 tokens of prompt, and launched as one; this changes no bits, and memory that
        runs out lets go of recordings. `RequestError` off CUDA.
        """
        with self._turn:
            if cuda_graphs and self.device.type != "cuda":
                raise RequestError(f"CUDA graphs need a CUDA device, this pipeline is on {self.device}; leave them out")
            self._compiles = self._compiles or not is_compiled(self.transformer)
            compile_blocks(self.transformer)
            if cuda_graphs:
                use_graphs(self.transformer)
                self.text_encoder.use_graphs()
        return self

    def uncompile(self) -> Self:
        """Compute as before `compile`, with the bits of before; returns the pipeline itself."""
        with self._turn:
            self._restore()
        return self

    def close(self) -> None:
        """Let go of the models; the pipeline cannot be used afterwards. Modules that were handed in stay as they are.

        `with` does it at the end of its block.
        """
        with self._turn:
            self._residency.close()
            if self._compiles and "transformer" in vars(self):
                self._restore()
            for name in _MODELS:
                vars(self).pop(name, None)
        release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if name in _MODELS:
            raise RequestError("this pipeline was closed; load it again")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def _follow(self, loaded: Components, device: torch.device, held_before: int | None) -> None:
        """Let the plan that `loaded` was loaded for go on: what it streams passes through `device`."""
        self._plan, self._held_before = loaded.plan, held_before
        placement = loaded.plan.placement if loaded.plan else None
        self._residency.close()
        self._residency = Residency(
            self.text_encoder.model, self.transformer,
            placement=placement, device=device, layers=loaded.layers, read=loaded.read,
        )  # fmt: skip
        if placement is not None and placement.text_encoder == "streamed":
            self.text_encoder.device = device

    def _fit(self, request: ResolvedRequest) -> None:
        """Raises `NotEnoughMemory` if a picture does not fit in the amount that the model was loaded with."""
        if self._plan is not None:
            require_fit(self._plan, *demands(request))

    def _strip_levels(self, request: ResolvedRequest) -> int:
        """How many of the autoencoder's levels a picture needs in strips."""
        return self._least_strips if self._plan is None else self._fitted(self._plan, request).placement.strip_levels

    def _fits_beside(self, stage: str, request: ResolvedRequest, current: ResolvedRequest) -> bool:
        """Whether the plan has room for a stage of one picture beside the steps of another; no plan, no."""
        return self._plan is not None and fits_beside(self._plan, stage, demands(request), demands(current))

    def _attempt(self, stage: str, request: ResolvedRequest, let_go: Callable[[], None] | None = None) -> Attempt:
        """Computes a stage ("prompt", "image", "denoising", "decoding") of a picture; where memory runs out, again with
        less, after letting go of recordings and `let_go`."""
        step_down, let_all_go = partial(self._step_down, stage, request), partial(self._forget_graphs, let_go)
        return partial(with_less, step_down=step_down, let_go=let_all_go)

    def _step_down(self, stage: str, request: ResolvedRequest, reason: str) -> None:
        """Take the next rung, for this picture and those after it; raises `NotEnoughMemory` where there is none."""
        plan = self._planned()
        lowered = lower(self._fitted(plan, request), stage, has_files=self._residency.read is not None)
        kept, work = replace(plan, placement=lowered.placement, budget=lowered.budget), plan.work
        kept, _ = fit_picture(kept, work.height, work.width, work.tokens, together=work.together)
        height, width, *_ = demands(request)
        sentence = f"{stage} ran out of memory at {width}x{height} ({reason}); since then: "
        self._move(replace(kept, stepped_down=(*plan.stepped_down, f"{sentence}{lowered.placement}")), self.device)
        # What ran out may not be what needs most: by the budget alone there would be no more strips than before.
        if self._fitted(kept, request).placement.strip_levels < lowered.placement.strip_levels:
            self._least_strips = lowered.placement.strip_levels

    def _fitted(self, plan: Plan, request: ResolvedRequest) -> Plan:
        """`plan` for a picture, with no fewer strips than were asked for or than memory was found to have room for."""
        return fit_picture(plan, *demands(request), least_strips=self._least_strips)[0]

    def _offload(self, device: str | torch.device | None, **changes: Any) -> None:
        with self._turn:
            target = self.device if device is None and self.device.type != "cpu" else runtime.choose_device(device)
            plan = self._planned()
            if target.type != self.device.type:
                plan = replace(plan, budget=find_budget("auto", target))
            wanted = replace(plan.placement, slots=max(SLOTS, plan.placement.slots), **changes)
            has_files, on_host = self._residency.read is not None, target.type != "cuda"
            if on_host:
                wanted = replace(wanted, text_source="files", block_source="files")
            if not has_files and "files" in (wanted.text_source, wanted.block_source):
                raise RequestError(
                    f"on {target} weights can only wait in the checkpoint's files, and these parts were handed in; "
                    "load the model with from_pretrained, or use a CUDA device"
                )
            placement = plan.placement.or_lower(wanted)
            self._move(follow(replace(plan, placement=placement), plan.sizes, plan.work.dtype), target)

    def _rungs(self) -> tuple[str, ...]:
        """What was said each time that memory ran out, until now."""
        return self._plan.stepped_down if self._plan else ()

    def _planned(self) -> Plan:
        """The plan, or for parts that were handed in the one that they are in: everything resident."""
        if self._plan is not None:
            return self._plan
        models = (self.text_encoder.model, self.transformer, self.autoencoder.vae)
        budget = find_budget("auto", self.device, loaded=True)
        return everything_resident(sizes_of_models(*models), str(self.dtype).removeprefix("torch."), budget)

    def _restore(self) -> None:
        drop_graphs(self.transformer)
        self.text_encoder.drop_graphs()
        restore_blocks(self.transformer)

    def _forget_graphs(self, also: Callable[[], None] | None = None) -> None:
        forget_graphs(self.transformer)
        self.text_encoder.forget_graphs()
        if also is not None:
            also()

    def _move(self, plan: Plan, device: torch.device) -> None:
        self._forget_graphs()
        try:
            self._residency.place(plan.placement, device)
            self.autoencoder.vae.to(device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise NotEnoughMemory(f"memory ran out while layers were moved for this plan: {plan}") from error
        if plan.placement.text_encoder == "streamed":
            self.text_encoder.device = device
        if device != self.device:
            self.text_encoder.forget()
        self._plan = plan

    def _require_plain(self, what: str) -> None:
        if self.weights is not None:
            is_asked = self.weights in STORED_BYTES
            otherwise = "with weight_dtype='full'" if is_asked else f"without the {self.weights.upper()} file"
            raise RequestError(
                f"the weights of this pipeline are stored in {self.weights}, so it cannot be {what}; "
                f"load it again {otherwise}"
            )

    def _require_resident(self, what: str) -> None:
        if self._residency.streams:
            raise RequestError(
                f"parts of this pipeline pass through the device as its plan has it, so it cannot be {what}; load it "
                "again with the device, dtype and memory that are wanted"
            )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """One thread at a time, without gradients, and in the pipeline's own precision whatever autocast is around."""
        with self._turn.to_compute():
            device = self.device.type  # asked in its turn: who came before may have closed the pipeline
            with torch.no_grad(), torch.autocast(device, enabled=False):
                yield
