"""Recorded forwards: the bits of those that are computed, and never of weights, hooks or settings that are gone.

A CPU has no such graphs. What stands in for one does a recorded computation again, in the places that it was recorded
with, and keeps the result in one place: as a graph does it, so that what is not copied in or out shows.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zimage import RequestError, ZImagePipeline, ZImageWarning
from zimage.kernels.switch import using
from zimage.models import graphs
from zimage.models.attention import attend
from zimage.models.graphs import CUDARecorder, drop_graphs, forget_graphs, use_graphs, uses_graphs

CALL: dict[str, Any] = {"height": 64, "width": 64, "any_size": True, "num_inference_steps": 3}


@dataclass
class Recording:
    """Records for a CPU, and counts."""

    records: int = 0
    replays: int = 0

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.records += 1
        made = compute()
        with torch.inference_mode(False):  # a graph writes to memory, whatever torch thinks of tensors there
            result = None if made is None else torch.empty_like(made)

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                result.copy_(compute())

        return replay, result


def load(folder: Path, **options: Any) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, device="cpu", **{"dtype": "float32", **options})


def latents(pipe: ZImagePipeline, prompt: str = "a fox", seed: int = 1, **options: Any) -> Tensor:
    return pipe(prompt, seed=seed, progress=False, output_type="latent", **{**CALL, **options}).images[0]  # type: ignore[union-attr]


def recorded(folder: Path, **options: Any) -> tuple[ZImagePipeline, Recording]:
    pipe, recording = load(folder, **options), Recording()
    use_graphs(pipe.transformer, recording, "cpu")
    return pipe, recording


def test_pictures_have_the_same_bits_and_a_size_is_recorded_once(turbo_folder: Path) -> None:
    pipe, recording = recorded(turbo_folder)
    plain = load(turbo_folder)
    for seed in (1, 2):
        for prompt in ("a fox", "two cats", "a fox " * 30):
            assert torch.equal(latents(pipe, prompt, seed), latents(plain, prompt, seed))
    assert recording == Recording(records=3, replays=6 * 2 * 3)  # refine of the size, denoise of two lengths
    assert torch.equal(latents(pipe, height=96), latents(plain, height=96))
    assert recording.records == 5


def test_a_guided_picture_of_two_lengths(base_folder: Path) -> None:
    pipe, recording = recorded(base_folder)
    options = {"negative_prompt": "blurry " * 30, "guidance_scale": 4.0}
    assert torch.equal(latents(pipe, **options), latents(load(base_folder), **options))
    assert (recording.records, recording.replays) == (2, 3 * 2)  # refiner and layers, each once a step for both
    assert torch.equal(latents(pipe, guidance_scale=4.0), latents(load(base_folder), guidance_scale=4.0))
    assert (recording.records, recording.replays) == (4, 3 * 4)  # the refiner for one branch, of one length


def test_results_are_not_written_over(turbo_folder: Path) -> None:
    pipe, _ = recorded(turbo_folder)
    transformer = pipe.transformer
    generator = torch.Generator().manual_seed(1)
    first, second, features = (torch.randn(s, generator=generator) for s in ((1, 16, 8, 8), (1, 16, 8, 8), (20, 64)))
    with torch.no_grad():
        caption = transformer.encode_caption(features)
        grid = transformer.grid(8, 8, caption.length)
        (modulation,) = transformer.modulations(torch.tensor([0.3]))
        made = transformer.denoise(first, caption, grid, modulation)
        kept = made.clone()
        assert not torch.equal(transformer.denoise(second, caption, grid, modulation), kept)
    assert torch.equal(made, kept)


def hook_a_layer(pipe: ZImagePipeline) -> None:
    pipe.transformer.layers[1].attention.to_v.register_forward_hook(lambda module, inputs, output: output / 2)


class Halved(nn.Module):
    """What an adapter does to a layer: it stands in its place, with a strength that is a plain number."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.strength = layer, 0.5

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden) * self.strength


def adapt_a_layer(pipe: ZImagePipeline) -> None:
    attention = pipe.transformer.layers[1].attention
    attention.to_v = Halved(attention.to_v)


def move_a_weight(pipe: ZImagePipeline) -> None:
    weight = pipe.transformer.layers[1].attention.to_v.weight
    weight.data = weight.data / 2


def change_the_precision(pipe: ZImagePipeline) -> None:
    pipe.to(torch.bfloat16)


def replace_a_layer(pipe: ZImagePipeline) -> None:
    attention = pipe.transformer.layers[1].attention
    attention.to_v = nn.Linear(attention.to_v.in_features, attention.to_v.out_features, bias=False)
    nn.init.constant_(attention.to_v.weight, 0.01)


def attend_otherwise(pipe: ZImagePipeline) -> None:
    pipe.transformer.attend = lambda query, key, value, **_: value


COMPUTED, RECORDED_AGAIN = Recording(records=2, replays=6), Recording(records=4, replays=12)


@pytest.mark.parametrize(
    ("change", "done"),
    [
        (hook_a_layer, COMPUTED),
        (adapt_a_layer, COMPUTED),
        (move_a_weight, RECORDED_AGAIN),
        (change_the_precision, RECORDED_AGAIN),
        (replace_a_layer, RECORDED_AGAIN),
        (attend_otherwise, RECORDED_AGAIN),
    ],
)
def test_what_changes_later_acts(turbo_folder: Path, change: Callable[[ZImagePipeline], None], done: Recording) -> None:
    """A real graph would go on with what was there when it was recorded, so what is counted matters as well."""
    pipe, recording = recorded(turbo_folder)
    plain = load(turbo_folder)
    before = latents(pipe)
    assert recording == COMPUTED
    for one in (pipe, plain):
        change(one)
    made = latents(pipe)
    assert recording == done
    assert torch.equal(made, latents(plain))
    assert not torch.equal(made, before)


def test_an_adapters_strength_is_read_each_time(turbo_folder: Path) -> None:
    pipe, recording = recorded(turbo_folder)
    adapt_a_layer(pipe)
    before = latents(pipe)
    pipe.transformer.layers[1].attention.to_v.strength = 0.25
    assert not torch.equal(latents(pipe), before)
    assert recording == Recording()


def test_a_weight_that_is_written_in_place_needs_no_new_recording(turbo_folder: Path) -> None:
    pipe, recording = recorded(turbo_folder)
    before = latents(pipe)
    with torch.no_grad():
        pipe.transformer.layers[1].attention.to_v.weight.mul_(0.5)
    assert not torch.equal(latents(pipe), before)
    assert recording.records == 2


def test_larger_forwards_are_computed(turbo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, recording = recorded(turbo_folder)
    monkeypatch.setattr(graphs, "MOST_TOKENS", 64)
    latents(pipe)
    assert recording.records == 2  # 32 tokens of image, 32 of caption
    latents(pipe, "a fox " * 30)
    assert recording.records == 2
    latents(pipe, height=512)
    assert recording == Recording(records=2, replays=3 * 3)


def test_tokens_of_all_pictures_count(turbo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, recording = recorded(turbo_folder)
    monkeypatch.setattr(graphs, "MOST_TOKENS", 64)
    transformer = pipe.transformer
    with torch.no_grad():
        caption = transformer.encode_caption(torch.randn(5, 64))
        grid = transformer.grid(8, 8, caption.length)  # 32 tokens with those that fill up
        (modulation,) = transformer.modulations(torch.tensor([0.5]))
        transformer.refine(torch.randn(2, 16, 8, 8), grid, modulation)
        assert recording.records == 1
        transformer.refine(torch.randn(3, 16, 8, 8), grid, modulation)
    assert recording.records == 1


def test_no_more_than_a_few_are_kept(turbo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, recording = recorded(turbo_folder)
    plain = load(turbo_folder)
    monkeypatch.setattr(graphs, "KEPT", 2)
    sides = (64, 96, 64)
    for side in sides:
        assert torch.equal(latents(pipe, height=side), latents(plain, height=side))
    assert recording.records == 2 * len(sides)


def test_no_more_of_their_inputs_is_kept_than_a_bound(turbo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, recording = recorded(turbo_folder)
    plain = load(turbo_folder)
    monkeypatch.setattr(graphs, "KEPT_BYTES", 40_000)  # a few of these inputs
    kept = vars(pipe.transformer)["refine"].__self__
    for side in (64, 96, 128, 64):
        assert torch.equal(latents(pipe, height=side), latents(plain, height=side))
        assert 0 < kept._held() <= 40_000
    assert recording.records > 2 * 3
    monkeypatch.setattr(graphs, "KEPT_BYTES", 0)
    assert torch.equal(latents(pipe, height=80), latents(plain, height=80))
    assert len(kept._kept) == 1  # the last, whatever it holds


def test_inputs_of_one_shape_lie_in_one_place(turbo_folder: Path) -> None:
    """As image tokens do beside captions of different lengths; each replay begins by writing its own there."""
    pipe, recording = recorded(turbo_folder)
    plain, prompts = load(turbo_folder), ["a fox", "a fox " * 30, "a cat"]
    kept = vars(pipe.transformer)["refine"].__self__
    for prompt in prompts * 2:
        assert torch.equal(latents(pipe, prompt), latents(plain, prompt))
    assert recording.records == 3  # the image alone, and beside captions of two lengths
    denoise = [places for (name, *_), (places, *_) in kept._kept.items() if name == "denoise"]
    assert len(denoise) == 2
    shared = [one is other for one, other in zip(*denoise, strict=True)]
    same = [one.shape == other.shape for one, other in zip(*denoise, strict=True)]
    assert shared == same
    assert (any(shared), all(shared)) == (True, False)
    assert kept._held() < sum(one.nbytes for places, *_ in kept._kept.values() for one in places)
    for places in denoise:
        assert len(set(map(id, places))) == len(places)


def test_memory_that_runs_out_elsewhere_lets_go_of_recordings_first(
    turbo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, _ = recorded(turbo_folder)
    expected, own, failures = latents(pipe), pipe.autoencoder.decode, []
    kept = vars(pipe.transformer)["refine"].__self__
    assert kept._kept

    def decode(*args: Any, **options: Any) -> Any:
        if not failures:
            failures.append(len(kept._kept))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert not kept._kept
        return own(*args, **options)

    monkeypatch.setattr(pipe.autoencoder, "decode", decode)
    output = pipe("a fox", height=64, width=64, num_inference_steps=1, seed=1, any_size=True)
    assert (len(failures), output.stepped_down) == (1, ())
    assert torch.equal(latents(pipe), expected)


def test_gradients_and_blocks_that_pass_through_are_computed(turbo_folder: Path) -> None:
    pipe, recording = recorded(turbo_folder)
    transformer = pipe.transformer.requires_grad_(True)
    features, noise = torch.ones(20, 64), torch.ones(1, 16, 8, 8)
    caption = transformer.encode_caption(features)
    (modulation,) = transformer.modulations(torch.tensor([0.3]))
    transformer.denoise(noise, caption, transformer.grid(8, 8, caption.length), modulation).sum().backward()
    assert transformer.layers[0].attention.to_q.weight.grad is not None
    transformer.requires_grad_(False)
    pipe.enable_sequential_cpu_offload()
    assert torch.equal(latents(pipe), latents(load(turbo_folder)))
    assert recording == Recording()


def test_moving_weights_lets_go_of_recordings(turbo_folder: Path) -> None:
    pipe, recording = recorded(turbo_folder)
    latents(pipe)
    forget_graphs(pipe.transformer)
    latents(pipe)
    assert recording.records == 4
    pipe.enable_model_cpu_offload()
    assert not vars(pipe.transformer)["refine"].__self__._kept


def test_steps_are_recorded_though_prompts_pass_through_the_device(turbo_folder: Path) -> None:
    """Of the two models only one has layers that come and go."""
    pipe, recording = recorded(turbo_folder)
    pipe.enable_model_cpu_offload()
    assert pipe._residency.streams
    assert ("hold" in vars(pipe.text_encoder.model), "hold" in vars(pipe.transformer)) == (True, False)
    for _ in range(2):
        assert torch.equal(latents(pipe), latents(load(turbo_folder)))
    assert (recording.records, recording.replays) == (2, 2 * 2 * CALL["num_inference_steps"])


def test_converting_lets_go_of_recordings_at_once(turbo_folder: Path) -> None:
    """Also where nothing would be recorded any more, as on a CPU."""
    pipe, _ = recorded(turbo_folder)
    latents(pipe)
    kept = vars(pipe.transformer)["refine"].__self__._kept
    assert kept
    pipe.to(torch.bfloat16)
    assert not kept


def test_recording_that_fails_is_a_warning_and_the_same_picture(turbo_folder: Path) -> None:
    def refuse(compute: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    pipe = load(turbo_folder)
    use_graphs(pipe.transformer, refuse, "cpu")
    with pytest.warns(ZImageWarning, match=r"cannot be recorded in CUDA graphs here.*RuntimeError: operation not"):
        made = latents(pipe)
    assert not uses_graphs(pipe.transformer)
    assert torch.equal(made, latents(load(turbo_folder)))


def test_memory_that_runs_out_is_no_reason_to_give_up(turbo_folder: Path) -> None:
    full = True

    def record(compute: Callable[[], Tensor]) -> Any:
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return recording(compute)

    recording, pipe = Recording(), load(turbo_folder)
    use_graphs(pipe.transformer, record, "cpu")
    expected = latents(load(turbo_folder))
    assert torch.equal(latents(pipe), expected)
    full = False
    assert torch.equal(latents(pipe), expected)
    assert recording.records == 2


def test_what_a_failed_recording_held_is_gone_before_it_is_computed(turbo_folder: Path) -> None:
    """Or the memory that was too little for a recording would be too little for the step as well."""
    held: list[weakref.ref[Tensor]] = []

    def record(compute: Callable[[], Tensor]) -> Any:
        half_done = torch.zeros(8)
        held.append(weakref.ref(half_done))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def attend_watching(*given: Any, **options: Any) -> Tensor:
        assert [one() for one in held] == [None] * len(held)
        return attend(*given, **options)

    pipe = load(turbo_folder)
    pipe.transformer.attend = attend_watching
    use_graphs(pipe.transformer, record, "cpu")
    assert torch.equal(latents(pipe), latents(load(turbo_folder)))
    assert len(held) == 2 * 3  # refine and denoise of each step


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
def test_a_recording_is_good_outside_of_the_mode_that_it_was_made_in(turbo_folder: Path, around: Any) -> None:
    pipe, recording = recorded(turbo_folder)
    plain = load(turbo_folder)
    with around():
        assert torch.equal(latents(pipe), latents(plain))
    assert torch.equal(latents(pipe, "a cat", 2), latents(plain, "a cat", 2))
    with torch.inference_mode():
        assert torch.equal(latents(pipe, "an owl", 3), latents(plain, "an owl", 3))
    assert recording == Recording(records=2, replays=3 * 2 * 3)


def test_threads_share_recordings(turbo_folder: Path) -> None:
    pipe, _ = recorded(turbo_folder)
    twin = ZImagePipeline.from_diffusers(pipe.to_diffusers())
    prompts = ["a fox", "a cat", "a dog", "an owl"]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda job: latents(*job), zip((pipe, twin) * 2, prompts, strict=True)))
    plain = load(turbo_folder)
    for prompt, one in zip(prompts, made, strict=True):
        assert torch.equal(one, latents(plain, prompt))


def test_there_is_a_way_back(turbo_folder: Path) -> None:
    pipe, recording = recorded(turbo_folder)
    use_graphs(pipe.transformer, Recording(), "cpu")
    latents(pipe)
    assert recording.records == 2  # a second call changes nothing
    pipe.uncompile()
    assert not uses_graphs(pipe.transformer)
    assert not {"refine", "denoise"} & set(vars(pipe.transformer))
    drop_graphs(pipe.transformer)


def captions(pipe: ZImagePipeline, *prompts: str) -> list[Tensor]:
    """Features of prompts that were not read before, with kernels."""
    pipe.text_encoder.forget()
    with using("on"):
        return [pipe.text_encoder.encode(pipe.text_encoder.tokenize(one, 512)) for one in prompts]


@pytest.mark.skipif(find_spec("triton") is None, reason="prompts are recorded of kernels")
def test_prompts_are_recorded_once_for_32_tokens(turbo_folder: Path) -> None:
    pipe, recording = load(turbo_folder), Recording()
    prompts = ["a fox", "two cats", "a fox " * 30]
    expected = captions(pipe, *prompts)
    pipe.text_encoder.use_graphs(recording, "cpu")
    for one, wanted in zip(captions(pipe, *prompts), expected, strict=True):
        assert torch.equal(one, wanted)
    assert recording == Recording(records=2, replays=3)
    weight = pipe.text_encoder.model.layers[0].self_attn.q_proj.weight
    pipe.text_encoder.model.layers[0].self_attn.q_proj.weight = nn.Parameter(weight * 2, requires_grad=False)
    (changed,) = captions(pipe, "a fox")
    assert recording.records == 3
    pipe.text_encoder.drop_graphs()
    assert torch.equal(captions(pipe, "a fox")[0], changed)
    assert not torch.equal(changed, expected[0])
    assert recording == Recording(records=3, replays=4)


@pytest.mark.skipif(find_spec("triton") is None, reason="prompts are recorded of kernels")
def test_prompts_that_are_not_recorded(turbo_folder: Path) -> None:
    """Of a text encoder that is looked at, without kernels, and after memory was given back."""
    pipe, recording = load(turbo_folder), Recording()
    pipe.text_encoder.use_graphs(recording, "cpu")
    captions(pipe, "a fox")
    hook = pipe.text_encoder.model.layers[0].mlp.register_forward_hook(lambda *given: None)
    captions(pipe, "a fox")
    hook.remove()
    latents(pipe)
    assert recording == Recording(records=1, replays=1)
    pipe.text_encoder.forget_graphs()
    captions(pipe, "a fox")
    assert recording == Recording(records=2, replays=2)
    pipe.uncompile()
    captions(pipe, "a fox")
    assert recording == Recording(records=2, replays=2)


@pytest.mark.skipif(find_spec("triton") is None, reason="prompts are recorded of kernels")
def test_prompts_that_cannot_be_recorded_are_tried_once(turbo_folder: Path) -> None:
    tries: list[int] = []

    def refuse(compute: Callable[[], Tensor]) -> Any:
        tries.append(len(tries))
        raise RuntimeError("operation not permitted when stream is capturing")

    pipe = load(turbo_folder)
    expected = captions(pipe, "a fox")[0]
    pipe.text_encoder.use_graphs(refuse, "cpu")
    with pytest.warns(ZImageWarning, match="Qwen3Model cannot be recorded in CUDA graphs here"):
        made = captions(pipe, "a fox", "an owl", "a fox " * 30)
    assert tries == [0]
    assert torch.equal(made[0], expected)


@pytest.mark.skipif(find_spec("triton") is None, reason="prompts are recorded of kernels")
def test_prompts_that_a_kernel_refuses_are_left_to_the_model(
    turbo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all kernels do with ZIMAGE_KERNELS=off."""
    from zimage.kernels import fused

    monkeypatch.setattr(fused, "rotate_normalized", lambda *given: None)
    pipe, recording, prompts = load(turbo_folder), Recording(), ["a fox", "two cats", "a fox " * 30]
    expected = captions(pipe, *prompts)
    pipe.text_encoder.use_graphs(recording, "cpu")
    for _ in range(2):
        for one, wanted in zip(captions(pipe, *prompts), expected, strict=True):
            assert torch.equal(one, wanted)
    assert recording == Recording(records=2, replays=0)  # once for each length, of which nothing came


def test_a_cpu_has_none(turbo: ZImagePipeline) -> None:
    with pytest.raises(RequestError, match="CUDA graphs need a CUDA device, this pipeline is on cpu; leave them out"):
        turbo.compile(cuda_graphs=True)
    assert not turbo.compiled


@dataclass(eq=False)
class Stream:
    """Of a card that is not there."""

    device: int

    @property
    def cuda_stream(self) -> int:
        return id(self)


DEFAULT = Stream(0)


@dataclass(eq=False)
class Graph:
    """Holds its pool until it is gone, as torch's does."""

    card: Card
    pool: int = 0
    stream: Stream | None = None

    def replay(self) -> None:
        assert self.stream is not None

    def __del__(self) -> None:
        if self.stream is not None:
            self.card.using[self.pool] -= 1


@dataclass
class Card:
    """What torch says of streams and graphs on CUDA, and what it refuses: to record into a pool whose graphs are all
    gone (`use_count > 0 INTERNAL ASSERT FAILED`). A recording that fails leaves its stream the current one."""

    device: int = 0
    stream: Any = None
    pools: int = 0
    using: dict[int, int] = field(default_factory=dict)
    seen: list[Any] = field(default_factory=list)
    broken: bool = False

    def computed(self) -> Tensor:
        """Where it is computed is noted."""
        self.seen.append(self.stream)
        if self.broken and self.stream is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.ones(2)

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def recording(self, graph: Graph, *, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert (stream.device, capture_error_mode) == (self.device, "thread_local")
        if self.using.get(pool) == 0:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        before, self.stream = self.stream, stream
        yield  # an error leaves the stream
        self.stream = before
        graph.pool, graph.stream = pool, stream
        self.using[pool] = self.using.get(pool, 0) + 1

    @contextmanager
    def of(self, _: Tensor) -> Iterator[None]:
        """Within it the device that tensors are on, the second, is the current one."""
        before, self.device = self.device, 1
        try:
            yield
        finally:
            self.device = before


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: made.device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: made.stream or DEFAULT)
    monkeypatch.setattr(torch.cuda, "device_of", made.of)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", made.new_pool)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(made))
    monkeypatch.setattr(torch.cuda, "graph", made.recording)
    return made


def test_each_recorder_has_a_stream_of_its_own(card: Card) -> None:
    """And warms up on that of its caller: torch keeps cuBLAS's memory for every stream that ever multiplied."""
    one, other = CUDARecorder(), CUDARecorder()
    kept = [recorder(card.computed) for recorder in (one, other, one)]
    warm, streams = card.seen[::2], card.seen[1::2]
    assert warm == [None] * len(kept)
    assert streams[0] is streams[2] is not streams[1]
    assert None not in streams
    assert card.using == {1: 2, 2: 1}


def test_recordings_of_two_streams_share_nothing(card: Card) -> None:
    """They may be replayed at once, by two threads or beside the steps of `generate_many`."""
    recorder, other = CUDARecorder(), Stream(0)
    kept = [recorder(card.computed)]
    with card.on(other):
        kept += [recorder(card.computed), recorder(card.computed)]
    kept.append(recorder(card.computed))
    assert card.seen[::2] == [None, other, other, None]
    first, *of_other, last = card.seen[1::2]
    assert first is last is not of_other[0] is of_other[1]
    assert card.using == {1: 2, 2: 2}


def test_memory_whose_recordings_are_gone_is_not_taken_up_again(card: Card) -> None:
    recorder = CUDARecorder()
    kept = [recorder(card.computed), recorder(card.computed)]
    kept.pop()
    kept.append(recorder(card.computed))
    assert card.using == {1: 2}  # while there is one it is shared
    kept.clear()
    kept.append(recorder(card.computed))
    assert card.using == {1: 0, 2: 1}


def test_a_recording_that_fails_leaves_the_stream_as_it_was(card: Card) -> None:
    recorder, card.broken = CUDARecorder(), True
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder(card.computed)
    assert (card.stream, gc.isenabled()) == (None, True)
    card.broken = False
    recorder(card.computed)
    assert card.stream is None


@pytest.mark.parametrize("collects", [True, False])
def test_no_unreachable_graph_is_freed_while_another_is_recorded(card: Card, collects: bool) -> None:
    """As one that a cycle holds would be, by whatever allocates; the collector is then as it was."""
    seen: list[tuple[bool, bool]] = []

    def computed() -> Tensor:
        seen.append((card.stream is not None, gc.isenabled()))
        return torch.ones(2)

    gc.enable() if collects else gc.disable()
    try:
        CUDARecorder()(computed)
        assert seen == [(False, collects), (True, False)]
        assert gc.isenabled() is collects
    finally:
        gc.enable()


def test_it_is_recorded_on_the_device_where_the_model_is(turbo_folder: Path, card: Card) -> None:
    devices: list[int] = []

    def record(compute: Callable[[], Tensor]) -> Any:
        devices.append(torch.cuda.current_device())
        return recording(compute)

    recording, pipe = Recording(), load(turbo_folder)
    use_graphs(pipe.transformer, record, "cpu")
    latents(pipe)
    assert devices == [1, 1]
    assert card.device == 0
