"""Many pictures, one after the other: while one is denoised, the next prompt is encoded and the last picture decoded.

The thread that asks for pictures takes the steps. What goes on beside a step is in a thread that lives no longer than
that step, within the same turn at the models: it takes no lock, and while the generator rests nothing runs. On CUDA
its work is on a stream of its own. What fails beside a step is done again in turn, by the code of a single call, and
raises there. Knows no stage from within: those are the pipeline's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .callbacks import check_cancel
from .calls import Call, CancelToken, as_request, progress_bar, texts_of, tokens_of, warn_if_cut
from .calls import result_of as latents_of
from .denoiser import Preparation
from .errors import RequestError
from .hires import demands
from .memory.ladder import is_out_of_memory
from .memory.streams import own_stream
from .models.text_encoder import Tokens
from .output import Drawn
from .request import AnyRequest, ResolvedRequest
from .rules import shown

if TYPE_CHECKING:
    from .controlled import Chosen
    from .files.png import Picture
    from .pipeline import ZImagePipeline

Job = Callable[[], tuple[Any, Sequence[Tensor]]]
"""What is computed beside a step: what it gives, and the tensors of it that later steps read."""


@dataclass(frozen=True)
class Failed:
    """A job that raised: why, if memory ran out. The error itself is not kept, for it holds on to memory."""

    reason: str | None


@dataclass(frozen=True)
class Denoised:
    """A picture that lacks its decode, and the one that is made beside the next picture's first step."""

    index: int
    request: ResolvedRequest
    chosen: Chosen
    latents: Tensor
    decoding: Future[Any] | None = None


class Drawing:
    """One run of `generate_many`. Lives as long as its generator and belongs to the thread that drives it."""

    def __init__(
        self,
        pipe: ZImagePipeline,
        requests: Iterable[AnyRequest | str],
        *,
        cancel: CancelToken | None,
        bar_options: Mapping[str, Any],
        embed_recipe: bool,
    ) -> None:
        """Raises `RequestError` if `requests` is one request, its options in a dict, or nothing to go through."""
        check_cancel(cancel)
        if isinstance(requests, AnyRequest | str | Mapping) or not isinstance(requests, Iterable):
            raise RequestError(
                f"requests must be a list of requests or texts, or anything else that gives them one by one; got "
                f"{shown(requests)}; put a single one into a list"
            )
        self._pipe, self._source = pipe, iter(requests)
        self._cancel, self._bar_options, self._embed_recipe = cancel, bar_options, embed_recipe
        self._preparation: Preparation | None = None
        self._waiting: Denoised | None = None
        self._beside: Future[Any] | None = None
        self._may_overlap = True
        self._notes: list[str] = []
        self._rungs = 0

    def pictures(self) -> Generator[Drawn, None, None]:
        """The pictures in order; an error comes after the picture that was denoised before it."""
        self._rungs = len(self._pipe._rungs())
        try:
            yield from self._drawn()
        except Exception:
            if self._waiting is not None:
                yield self._deliver()
            raise

    def _drawn(self) -> Generator[Drawn, None, None]:
        index, turn, read_ahead = 0, self._read(), None
        while turn is not None:
            if isinstance(turn, Exception):
                raise turn
            tokens = self._tokens(turn, read_ahead)
            warn_if_cut(tokens)
            following, read_ahead, steps, chosen = None, None, turn.steps, self._pipe._choose(turn)
            with progress_bar([turn], self._bar_options) as bar:
                call = Call(self._shared(), tokens, self._cancel, bar=bar, let_go=partial(self._let_go, turn))
                run = self._pipe._denoise(turn, chosen, call)
                for step in range(steps):
                    last = step + 1 == steps
                    following = self._read() if last else None
                    if self._waiting is not None:
                        self._decode_beside(run, self._waiting)
                        yield self._deliver()
                    elif last and isinstance(following, ResolvedRequest):
                        encodes = step > 0 and self._overlaps("prompt", following, turn)
                        read_ahead = self._step(run, partial(self._prepare, following, encodes), on_device=encodes)
                    else:
                        next(run)
                latents = latents_of(run)
                call.check_cancelled()
                self._waiting = Denoised(index, turn, chosen, latents)
            if not (isinstance(following, ResolvedRequest) and self._overlaps("decoding", turn, following)):
                yield self._deliver()
            index, turn = index + 1, following

    def _read(self) -> ResolvedRequest | Exception | None:
        """The next request, or what is wrong with it, which is raised when its turn comes; `None` at the end."""
        try:
            for one in self._source:
                resolved = self._pipe.resolve(as_request(one, "each of the requests"))
                self._pipe._fit(resolved)
                return resolved
        except Exception as error:
            return error
        return None

    def _tokens(self, request: ResolvedRequest, read_ahead: Future[Any] | None) -> Mapping[tuple[str, int], Tokens]:
        """The tokens of a request, those read ahead if they could be."""
        found = self._outcome("prompt", request, read_ahead)
        return tokens_of([request], self._pipe.text_encoder) if found is None else found

    def _shared(self) -> Preparation:
        """What the pictures share; anew where the models were moved or converted between two of them."""
        kept, transformer = self._preparation, self._pipe.transformer
        if kept is None or kept.transformer is not transformer or not kept.is_current:
            kept = self._preparation = Preparation(transformer)
        return kept

    def _overlaps(self, stage: str, request: ResolvedRequest, current: ResolvedRequest) -> bool:
        """Whether a stage of one picture goes to the device beside the steps of the current one."""
        device = self._pipe.device
        return self._may_overlap and computes_beside(device) and self._pipe._fits_beside(stage, request, current)

    def _decode_beside(self, run: Generator[Any, None, Any], waiting: Denoised) -> None:
        decoding = self._step(run, partial(self._decode, waiting), on_device=True)
        self._waiting = replace(waiting, decoding=decoding)

    def _step(self, run: Generator[Any, None, Any], job: Job, *, on_device: bool) -> Future[Any]:
        """Take a step with a job beside it, both within one turn at the models; neither outlasts it."""
        with self._pipe._computing(), ThreadPoolExecutor(1, thread_name_prefix="zimage-beside") as thread:
            beside = aside(self._pipe.device, job) if on_device else partial(attempted, job)
            done = thread.submit(copy_context().run, beside)  # what the caller set for its own thread holds there too
            self._beside = done if on_device else None
            try:
                next(run)
            finally:
                self._beside = None
        return done

    def _prepare(self, request: ResolvedRequest, encodes: bool) -> tuple[Any, Sequence[Tensor]]:
        """The tokens of a request; its features go where its turn will find them, into the encoder's cache."""
        encoder = self._pipe.text_encoder
        tokens = tokens_of([request], encoder)
        names = zip(("prompt_embeds", "negative_prompt_embeds"), texts_of(request), strict=False)
        texts = [text for name, text in names if encodes and name not in request.tensors]
        return tokens, [encoder.encode(tokens[text, request.max_sequence_length]) for text in texts]

    def _decode(self, waiting: Denoised) -> tuple[Picture, Sequence[Tensor]]:
        strips, _, image = self._pipe._decode(waiting.request, waiting.latents, "pil")
        assert image is not None
        return self._pipe._picture(waiting.request, waiting.chosen, strips, image, self._embed_recipe, ()), ()

    def _deliver(self) -> Drawn:
        """The picture that waits: as it was decoded beside a step, or else decoded in turn."""
        waiting, self._waiting = self._waiting, None
        assert waiting is not None
        request = waiting.request
        image = self._outcome("decoding", request, waiting.decoding)
        if image is None:
            image = self._pipe._finish(request, waiting.chosen, waiting.latents, "pil", self._embed_recipe)
        rungs = self._pipe._rungs()
        told = (*self._notes, *rungs[self._rungs :])
        self._notes, self._rungs = [], len(rungs)
        return Drawn(waiting.index, image, request, told)

    def _outcome(self, stage: str, request: ResolvedRequest, job: Future[Any] | None) -> Any:
        """What a job gave; `None` where there was none or it failed, so that its work is done in turn."""
        outcome = None if job is None else job.result()
        if not isinstance(outcome, Failed):
            return outcome
        if outcome.reason is not None:
            self._part(stage, request, f" ({outcome.reason})")
        return None

    def _let_go(self, request: ResolvedRequest) -> None:
        """Before a step that ran out of memory is taken again: nothing else is on the device then, nor later on."""
        if self._beside is not None:
            wait([self._beside])
            self._part("denoising", request)

    def _part(self, stage: str, request: ResolvedRequest, reason: str = "") -> None:
        """From now on nothing is computed beside steps. It is the first rung, and only this generator's."""
        if self._may_overlap:
            height, width, *_ = demands(request)
            size = f"{width}x{height}"
            self._notes.append(
                f"{stage} ran out of memory beside another picture at {size}{reason}; since then: one after the other"
            )
        self._may_overlap = False


def computes_beside(device: torch.device) -> bool:
    """Whether a device has room for work beside a step: a CPU's cores all take part in it already."""
    return device.type == "cuda"


def attempted(job: Job) -> Any:
    """What a job gives, or that it failed."""
    try:
        return job()[0]
    except Exception as error:
        return Failed(str(error).split("\n")[0] or type(error).__name__ if is_out_of_memory(error) else None)


def aside(device: torch.device, job: Job) -> Callable[[], Any]:
    """`job` for another thread, begun once all that this thread has asked of the device until now is done.

    On CUDA it computes on a stream of its own and ends when that is at rest, so that what it read may be let go of. The
    tensors that it leaves belong to its stream; their memory is not used again before this thread's is done with them.
    """
    if device.type != "cuda":
        return partial(attempted, job)
    here, side = torch.cuda.current_stream(device), side_stream(device)
    begin = here.record_event()

    def compute() -> tuple[Any, Sequence[Tensor]]:
        try:
            outcome, left = job()
            for tensor in left:
                if tensor.is_cuda:
                    tensor.record_stream(here)
            return outcome, ()
        finally:
            side.synchronize()

    def run() -> Any:
        with torch.cuda.stream(side):
            side.wait_event(begin)
            return attempted(compute)

    return run


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: memory that a stream's work took stays with the stream."""
    return own_stream(device)
