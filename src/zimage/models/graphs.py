"""Small forwards as CUDA graphs: launched as one, where launching takes longer than computing.

The transformer's `refine` and `denoise`, also of branches together, and what else `Recordings` are made for, are
recorded when they first see a size, and replayed with other numbers in the same places. What was recorded reads weights
where they were, so all that a replay depends on is looked at before each one; whatever does not fit a recording is
computed as it stands. Knows no pipeline.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..errors import ZImageWarning
from ..kernels import switch
from ..memory.ladder import is_out_of_memory
from ..memory.streams import own_stream
from .compiled import computes_plainly
from .layers import is_bare
from .transformer import Caption, Hint, ImageGrid, Modulation, ZImageTransformer

MOST_TOKENS = 5120
"""Image and caption tokens of all pictures of a forward that is recorded: 1024 x 1024 pixels and a caption of up to
1024. An H200 computes that as fast in float8 as a slow host launches it (docs/speed.md)."""
KEPT, KEPT_BYTES = 32, 256 * 2**20
"""Recordings of a transformer, and what their inputs may take: the image tokens of 1024 x 1024 pixels take 30 MiB, once
for all captions. A size has one, and one for each 32 tokens of caption; of branches together one or two a pair."""

_PLACES = ("refine", "refine_together", "denoise", "denoise_together")
_KNOWN = ("torch.nn.", "diffusers.models.", "transformers.", f"{__package__}.")
"""Where modules are defined whose computation follows from their tensors; an adapter's may change by a number."""

Value = TypeVar("Value")
Replay = Callable[[], Any]
Record = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Of a computation on tensors that stay where they are: what does it once more, and where its result then is."""


_capturing = threading.Lock()


@dataclass
class _Lane:
    """What the recordings for one stream of a card share, as one of them is replayed at a time."""

    stream: Any
    """They are made on it. What cuBLAS works in, torch keeps by stream, in the memory of the graph that was first to
    need it, and may let go of it with any other graph of that stream (pytorch#193402)."""
    pool: Any = None
    graphs: WeakSet[Any] = field(default_factory=WeakSet)


class CUDARecorder:
    """Records in CUDA graphs. Those that are replayed on the same stream share their memory: each result is copied
    before another is replayed. Those of two streams, as of two threads, may compute at once and share none."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[int, int], _Lane] = {}

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        compute()  # what is made at the first use, kernels and tables, must not be made while recording
        device = torch.cuda.current_device()
        place = device, torch.cuda.current_stream().cuda_stream
        lane = self._lanes.get(place) or self._lanes.setdefault(place, _Lane(own_stream(device)))
        if not lane.graphs:  # torch does not take up memory again whose graphs are all gone
            lane.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=lane.pool, stream=lane.stream, capture_error_mode="thread_local")
        # Other threads may allocate meanwhile, and not record. A recording that fails stays on its stream by itself.
        with _capturing, _uncollected(), torch.cuda.stream(lane.stream), recording:
            result = compute()
        lane.graphs.add(graph)
        return graph.replay, result


@contextmanager
def _uncollected() -> Iterator[None]:
    """Within it no unreachable cycle is freed: it may hold a graph, and to free one spoils another that is recorded."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Recordings:
    """What one model computed, for all threads; nothing is replayed for weights that were moved or replaced.

    Of `model` only the modules `parts` are computed with, and looked at.
    """

    def __init__(self, model: nn.Module, parts: tuple[nn.Module, ...], record: Record, device_type: str) -> None:
        self._model, self._parts, self._record, self._device_type = model, parts, record, device_type
        self._guard = threading.Lock()
        self._kept: dict[Any, tuple[list[Tensor], Replay, Tensor | None]] = {}
        self._seen: list[Any] | None = None
        self._gave_up = False

    def forget(self) -> None:
        """Let go of all recordings and their memory; what is needed again is recorded again."""
        with self._guard:
            self._kept.clear()

    def compute(self, name: str, own: Callable[..., Value], *args: Any) -> Value:
        """`own(*args)`, replayed if the same was recorded under `name`, and else recorded if that can be."""
        given = list(_tensors(args))
        if self._gave_up or not self._applies(given):
            return own(*args)
        with self._guard, torch.cuda.device_of(given[0]):  # which need not be the current one
            if not self._is_current():
                return own(*args)
            key = name, _shape(args), switch.mode(), _stream(self._device_type)
            return self._replayed(key, given) if self._is_recorded(key, own, args, given) else own(*args)

    def _applies(self, given: list[Tensor]) -> bool:
        """Whether inputs lie dense on the device, and nothing around asks for another computation."""
        if not computes_plainly() or "hold" in vars(self._model):
            return False
        return all(one.device.type == self._device_type and one.is_contiguous() for one in given)

    def _is_current(self) -> bool:
        """Whether recordings may be used; those of a model that is not the same any more are let go of."""
        seen = _state(self._model, self._parts)
        if seen != self._seen:
            self._kept.clear()
            self._seen = seen
        return seen is not None

    def _is_recorded(self, key: Any, own: Callable[..., Any], args: tuple[Any, ...], given: list[Tensor]) -> bool:
        """Whether there is a recording for `key`, which is made if there is none. Nothing is computed in place of one
        that fails until this has returned, and with it gone what the error holds on to."""
        if key in self._kept:
            return True
        try:
            places = [self._place(number, one, key[-1]).copy_(one) for number, one in enumerate(given)]
            self._kept[key] = places, *self._record(partial(own, *_with_tensors(args, iter(places))))
        except Exception as error:
            self._kept.clear()
            if not is_out_of_memory(error):
                self._give_up(error)
            return False
        while len(self._kept) > 1 and (len(self._kept) > KEPT or self._held() > KEPT_BYTES):
            del self._kept[next(iter(self._kept))]
        return True

    def _replayed(self, key: Any, given: list[Tensor]) -> Any:
        places, replay, result = self._kept[key]
        if result is None:  # nothing comes of such inputs, as where a kernel refuses them
            return None
        for dtype in {one.dtype for one in given}:  # one launch for all of a type
            pairs = [(place, one) for place, one in zip(places, given, strict=True) if one.dtype == dtype]
            torch._foreach_copy_([place for place, _ in pairs], [one for _, one in pairs])
        replay()
        return result.clone()

    def _place(self, number: int, given: Tensor, stream: Any) -> Tensor:
        """Where an input lies for a recording: with those of the same stream, of which one replays at a time, where
        they have an input of this number and shape."""
        for (*_, other), (places, *_) in self._kept.items():
            place = places[number] if other == stream and number < len(places) else None
            if place is not None and _shape(place) == _shape(given):
                return place
        with torch.inference_mode(False):  # or it could not be written to outside of that
            return torch.empty_like(given)

    def _held(self) -> int:
        return sum({id(one): one.nbytes for places, *_ in self._kept.values() for one in places}.values())

    def _give_up(self, error: Exception) -> None:
        self._gave_up = True
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"{type(self._model).__name__} cannot be recorded in CUDA graphs here, it computes without: "
            f"{type(error).__name__}: {reason} (pipe.compile() without cuda_graphs says that this is meant)",
            ZImageWarning,
            stacklevel=5,
        )


class Graphs(Recordings):
    """The recordings of one transformer."""

    def __init__(self, transformer: ZImageTransformer, record: Record, device_type: str) -> None:
        super().__init__(transformer, (transformer,), record, device_type)
        self._transformer = transformer

    def refine(self, latents: Tensor, grid: ImageGrid, modulation: Modulation, hint: Hint | None = None) -> Tensor:
        """The transformer's own `refine`; with a `hint`, which computes more between the blocks, as it stands."""
        if hint is not None:
            return type(self._transformer).refine(self._transformer, latents, grid, modulation, hint)
        own_grid = replace(grid, caption_length=0, rotations=grid.rotations[:, : grid.padded])  # one for all captions
        own_modulation = replace(modulation, blocks=modulation.blocks[: len(self._transformer.noise_refiner)])
        return self._small("refine", grid.padded, latents, own_grid, own_modulation)

    def refine_together(self, latents: Tensor, grids: Sequence[ImageGrid], modulation: Modulation) -> Tensor:
        """The transformer's own `refine_together`, of which only what differs from `refine` is recorded."""
        if len({grid.caption_length for grid in grids}) == 1:
            return type(self._transformer).refine_together(self._transformer, latents, grids, modulation)
        own = replace(modulation, blocks=modulation.blocks[: len(self._transformer.noise_refiner)])
        return self._small("refine_together", sum(grid.padded for grid in grids), latents, tuple(grids), own)

    def denoise(
        self,
        latents: Tensor,
        caption: Caption,
        grid: ImageGrid,
        modulation: Modulation,
        refined: Tensor | None = None,
        hint: Hint | None = None,
    ) -> Tensor:
        """The transformer's own `denoise`; with a `hint` as it stands."""
        image = self.refine(latents, grid, modulation) if refined is None else refined
        if hint is not None:
            own = type(self._transformer).denoise
            return own(self._transformer, latents, caption, grid, modulation, image, hint)
        return self._small("denoise", grid.padded + caption.length, latents, caption, grid, modulation, image)

    def denoise_together(
        self, latents: Tensor, captions: Sequence[Caption], grids: Sequence[ImageGrid], modulation: Modulation
    ) -> Tensor:
        """The transformer's own `denoise_together`."""
        images = self.refine_together(latents, grids, modulation)
        tokens = sum(grid.padded + grid.caption_length for grid in grids)
        given = latents, tuple(captions), tuple(grids), modulation, tuple(images)
        return self._small("denoise_together", tokens, *given)

    def _small(self, name: str, tokens: int, *args: Any) -> Tensor:
        own: Callable[..., Tensor] = partial(getattr(type(self._transformer), name), self._transformer)
        return own(*args) if tokens * len(args[0]) > MOST_TOKENS else self.compute(name, own, *args)

    def _give_up(self, error: Exception) -> None:
        super()._give_up(error)
        drop_graphs(self._transformer)


def use_graphs(transformer: ZImageTransformer, record: Record | None = None, device_type: str = "cuda") -> None:
    """Let small forwards on devices of a type be recorded by `record`, a `CUDARecorder` if not given; done once, it is
    done."""
    if not uses_graphs(transformer):
        graphs = Graphs(transformer, record or CUDARecorder(), device_type)
        for place in _PLACES:
            setattr(transformer, place, getattr(graphs, place))


def drop_graphs(transformer: ZImageTransformer) -> None:
    """The inverse of `use_graphs`; recordings are let go of."""
    if uses_graphs(transformer):
        for place in _PLACES:
            delattr(transformer, place)


def forget_graphs(transformer: ZImageTransformer) -> None:
    """Let go of the recordings, for memory that is short or weights that move; others are made when needed."""
    if uses_graphs(transformer):
        vars(transformer)[_PLACES[0]].__self__.forget()


def uses_graphs(transformer: ZImageTransformer) -> bool:
    """Whether small forwards are recorded and replayed."""
    return isinstance(getattr(vars(transformer).get(_PLACES[0]), "__self__", None), Graphs)


def _state(model: Any, parts: tuple[nn.Module, ...]) -> list[Any] | None:
    """All that a replay takes for given: modules, where their weights are, attention; `None` where some module's doing
    cannot be seen from here."""
    seen: list[Any] = [getattr(model, "attend", None), vars(model).get("_run_block")]
    modules: list[Any] = [*parts]
    while modules:
        module = modules.pop()
        called = module is not model  # whose own hooks are for those who call it, as diffusers does
        if (called and not is_bare(module)) or not type(module).__module__.startswith(_KNOWN):
            return None
        seen.append(module)
        if "processor" in vars(module):
            seen.append(getattr(module.processor, "_attention_backend", None))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                seen += [tensor.data_ptr(), tensor.dtype]
        modules += [child for child in module._modules.values() if child is not None]
    return seen


def _stream(device_type: str) -> Any:
    """Recordings of one stream are never replayed on another, where they would meet themselves."""
    return torch.cuda.current_stream().cuda_stream if device_type == "cuda" else None


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in _parts(value):
            yield from _tensors(part)


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """`value` with others in the places of its tensors, in the order of `_tensors`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        return tuple(_with_tensors(part, tensors) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{field.name: _with_tensors(getattr(value, field.name), tensors) for field in fields(value)}
        )
    return value


def _shape(value: Any) -> Any:
    """What a recording of `value` is good for: shapes, types and devices of its tensors, and all else as it is."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    parts = _parts(value)
    return tuple(map(_shape, parts)) if parts else value


def _parts(value: Any) -> tuple[Any, ...]:
    if isinstance(value, tuple):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return tuple(getattr(value, field.name) for field in fields(value))
    return ()
