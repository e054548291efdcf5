"""`generate_many`: the bits of single calls, in order, whatever is computed beside what, and nothing left behind.

A CPU overlaps nothing on the device. `beside` lets it, so that what a CUDA device does is run here with threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import OutOfMemoryError

from zimage import Cancelled, Drawn, GenerationRequest, NonFiniteError, RequestError, ZImagePipeline, ZImageWarning
from zimage import many as many_module
from zimage.files.recipe import pixel_digest
from zimage.kernels import switch
from zimage.many import aside

from .conftest import CountForwards, load

Watched = list[tuple[str, bool]]


def asked(prompt: str = "a fox", seed: int = 7, steps: int = 3, **more: Any) -> GenerationRequest:
    options = {"height": 64, "width": 64, **more}
    return GenerationRequest(prompt, seed=seed, num_inference_steps=steps, any_size=True, **options)


SHARED = [
    asked(),
    asked("a cat", seed=8, height=96),
    asked("a fox", seed=9, width=80, steps=1),
    asked("", steps=1),
    asked("a fox", sampler="heun", steps=2),
]
REQUESTS = {
    "turbo": [*SHARED, asked("狐狸 🦊", sigmas=[0.9, 0.3], steps=2)],
    "base": [*SHARED, asked(negative_prompt="blurry"), asked(guidance_scale=0), asked("a cat", cfg_normalization=True)],
}


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_module, "computes_beside", lambda device: True)


@pytest.fixture(params=["in turn", "beside"])
def _either_way(request: pytest.FixtureRequest) -> None:
    if request.param == "beside":
        request.getfixturevalue("beside")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [one.name for one in threading.enumerate() if one.name.startswith("zimage-beside")] == []


def watch(pipe: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """What the models are asked, and whether by another thread than this one."""
    here, asked_of = threading.get_ident(), []

    def watched(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            asked_of.append((name, threading.get_ident() != here))
            return compute(*given, **options)

        return call

    for owner, name in (
        (pipe.text_encoder, "tokenize"),
        (pipe.text_encoder, "_hidden_states"),
        (pipe.transformer, "denoise"),
        (pipe.transformer, "encode_caption"),
        (pipe.autoencoder, "decode"),
    ):
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    return asked_of


def digests(drawn: list[Drawn]) -> list[str]:
    return [pixel_digest(one.image) for one in drawn]


def alone(pipe: ZImagePipeline, requests: list[GenerationRequest]) -> list[str]:
    return [pixel_digest(pipe(request).images[0]) for request in requests]


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("variant", ["turbo", "base"])
def test_each_picture_is_that_of_a_call(variant: str, request: pytest.FixtureRequest) -> None:
    pipe: ZImagePipeline = request.getfixturevalue(variant)
    requests = REQUESTS[variant]
    expected = alone(pipe, requests)
    assert len(set(expected)) == len(requests)
    pipe.text_encoder.forget()
    drawn = list(pipe.generate_many(requests))
    assert digests(drawn) == expected
    assert [one.index for one in drawn] == list(range(len(requests)))
    assert [one.request for one in drawn] == [pipe.resolve(one) for one in requests]
    assert [one.image.recipe for one in drawn] == [pipe(one).images[0].recipe for one in requests]
    assert {one.stepped_down for one in drawn} == {()}
    assert digests(list(pipe.generate_many(requests[::-1], embed_recipe=False))) == expected[::-1]


def test_texts_are_enough_and_recipes_may_be_left_out(turbo: ZImagePipeline) -> None:
    request = turbo.resolve(asked())
    (drawn,) = turbo.generate_many([request], embed_recipe=False)
    assert drawn.image.recipe is None
    drawing = turbo.generate_many(iter(["a fox"]), cancel=Once(after=1))
    with pytest.raises(Cancelled):
        next(drawing)
    assert list(turbo.generate_many([])) == []


class Once:
    """A cancel token that is set from the check after `after` on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.usefixtures("beside")
def test_the_next_prompt_and_the_last_decode_are_beside_steps(
    own_turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_of = watch(own_turbo, monkeypatch)
    drawing = own_turbo.generate_many([asked("a fox", steps=2), asked("a cat", steps=2)])
    next(drawing)
    here = [name for name, elsewhere in asked_of if not elsewhere]
    first = ["tokenize", "_hidden_states", "encode_caption", "denoise", "denoise"]
    assert here == [*first, "encode_caption", "denoise"]
    assert [name for name, elsewhere in asked_of if elsewhere] == ["tokenize", "_hidden_states", "decode"]
    asked_of.clear()
    assert [one.index for one in drawing] == [1]
    assert asked_of == [("denoise", False), ("decode", False)]


def test_a_cpu_computes_in_turn(own_turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a picture is not kept waiting for a step of the next."""
    asked_of = watch(own_turbo, monkeypatch)
    drawing = own_turbo.generate_many([asked("a fox", steps=2), asked("a cat", steps=2)])
    next(drawing)
    assert [name for name, elsewhere in asked_of if elsewhere] == ["tokenize"]
    assert [name for name, _ in asked_of].count("denoise") == 2
    assert asked_of[-1] == ("decode", False)
    drawing.close()


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("forbidden", ["by the plan", "without a plan"])
def test_without_room_nothing_is_beside_steps(
    own_turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch, forbidden: str
) -> None:
    expected = alone(own_turbo, SHARED)
    own_turbo.text_encoder.forget()
    if forbidden == "by the plan":
        monkeypatch.setattr("zimage.placed.fits_beside", lambda *_: False)
    else:
        own_turbo._plan = None
    asked_of = watch(own_turbo, monkeypatch)
    assert digests(list(own_turbo.generate_many(SHARED))) == expected
    assert {name for name, elsewhere in asked_of if elsewhere} == {"tokenize"}


@pytest.mark.usefixtures("beside")
def test_a_text_encoder_that_passes_through_is_not_beside_steps(
    turbo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(turbo_folder)
    expected = alone(pipe, SHARED)
    pipe.enable_sequential_cpu_offload()
    pipe.text_encoder.forget()
    asked_of = watch(pipe, monkeypatch)
    assert digests(list(pipe.generate_many(SHARED))) == expected
    assert {name for name, elsewhere in asked_of if elsewhere} == {"tokenize", "decode"}
    pipe.close()


@pytest.mark.usefixtures("_either_way")
def test_requests_are_read_one_ahead_and_may_be_endless(turbo: ZImagePipeline) -> None:
    read: list[int] = []

    def endless() -> Iterator[GenerationRequest]:
        for seed in count():
            read.append(seed)
            yield asked(seed=seed, steps=2)

    drawing = turbo.generate_many(endless())
    assert read == []
    for done in range(4):
        assert next(drawing).request.seed == done
        assert read == list(range(done + 2))
    drawing.close()
    assert next(drawing, None) is None
    assert len(read) == 5


def test_what_pictures_share_is_computed_once(own_turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_of = watch(own_turbo, monkeypatch)
    list(own_turbo.generate_many([asked(seed=seed, steps=1) for seed in range(4)]))
    names = [name for name, _ in asked_of]
    assert (names.count("encode_caption"), names.count("_hidden_states"), names.count("denoise")) == (1, 1, 4)


@pytest.mark.parametrize("wrong", ["a fox", asked(), 3, None, {"prompt": "a fox", "seed": 3}])
def test_one_request_is_refused_at_once(turbo: ZImagePipeline, wrong: Any) -> None:
    with pytest.raises(RequestError, match="cancel must be an event"):
        turbo.generate_many([asked()], cancel=True)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="requests must be a list of requests or texts"):
        turbo.generate_many(wrong)


def raising() -> Iterator[GenerationRequest]:
    yield from (asked(), asked(seed=8))
    raise KeyError("the app's own")


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize(
    ("requests", "error", "said"),
    [
        (lambda: [asked(), asked(seed=8), asked(guidance_scale=4)], RequestError, "guidance_scale must be 0"),
        (lambda: [asked(), asked(seed=8), 5], RequestError, "each of the requests must be a request or a text, got "),
        (raising, KeyError, "the app's own"),
    ],
)
def test_an_error_comes_at_its_turn(
    turbo: ZImagePipeline, requests: Callable[[], Any], error: type[Exception], said: str
) -> None:
    expected = alone(turbo, [asked(), asked(seed=8)])
    drawing = turbo.generate_many(requests())
    assert digests([next(drawing), next(drawing)]) == expected
    with pytest.raises(error, match=said):
        next(drawing)
    assert next(drawing, None) is None


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("stage", ["_hidden_states", "denoise", "decode"])
def test_what_a_stage_raises_reaches_the_caller(
    own_turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Of the second picture, in its own type and after the first one, also where another thread met it first."""
    expected = alone(own_turbo, [asked()])
    own_turbo.text_encoder.forget()
    owner: Any = {"denoise": own_turbo.transformer, "decode": own_turbo.autoencoder}.get(stage, own_turbo.text_encoder)
    compute, calls = getattr(owner, stage), count()

    def breaks(*given: Any) -> Any:
        if next(calls) >= (3 if stage == "denoise" else 1):
            raise LookupError("broken")
        return compute(*given)

    monkeypatch.setattr(owner, stage, breaks)
    drawing, drawn = own_turbo.generate_many([asked(), asked("a cat"), asked("a dog")]), list[Drawn]()
    with pytest.raises(LookupError, match="broken"):
        drawn.extend(drawing)
    assert digests(drawn) == expected
    assert next(drawing, None) is None


@pytest.mark.usefixtures("_either_way")
def test_an_interrupt_stops_at_once(own_turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(own_turbo, [asked()])
    with monkeypatch.context() as patch:
        denoise, calls = own_turbo.transformer.denoise, count()

        def interrupted(*given: Any) -> Any:
            if next(calls) == 3:
                raise KeyboardInterrupt
            return denoise(*given)

        patch.setattr(own_turbo.transformer, "denoise", interrupted)
        drawing = own_turbo.generate_many([asked(), asked("a cat")])
        with pytest.raises(KeyboardInterrupt):
            list(drawing)
        assert next(drawing, None) is None
    assert alone(own_turbo, [asked()]) == expected


def elsewhere() -> bool:
    return threading.current_thread() is not threading.main_thread()


@pytest.mark.usefixtures("beside")
def test_the_picture_before_an_error_is_delivered(own_turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was denoised, and its decode was to be beside the step that failed."""
    expected = alone(own_turbo, [asked()])
    denoise, calls = own_turbo.transformer.denoise, count()

    def breaks(*given: Any) -> Any:
        return denoise(*given) * (float("nan") if next(calls) >= 3 else 1)

    monkeypatch.setattr(own_turbo.transformer, "denoise", breaks)
    drawing = own_turbo.generate_many([asked(), asked("a cat")])
    assert digests([next(drawing)]) == expected
    with pytest.raises(NonFiniteError, match="denoising step 1 of 3"):
        next(drawing)


@pytest.mark.usefixtures("_either_way")
def test_cancelling_loses_the_picture_that_is_being_denoised(turbo: ZImagePipeline) -> None:
    """The checks of a picture of three steps are five: before its prompt, before each step, and after the last."""
    for checks, kept in ((4, 0), (5, 1), (7, 1), (10, 2)):
        drawing = turbo.generate_many([asked(seed=seed) for seed in range(9)], cancel=Once(checks))
        drawn: list[Drawn] = []
        with pytest.raises(Cancelled):
            drawn.extend(drawing)
        assert [one.index for one in drawn] == list(range(kept))
        assert next(drawing, None) is None


@pytest.mark.usefixtures("_either_way")
def test_closing_stops_the_work(turbo: ZImagePipeline, count_forwards: CountForwards) -> None:
    expected = alone(turbo, [asked()])
    drawing = turbo.generate_many(asked(seed=seed) for seed in count())
    next(drawing)
    with count_forwards(turbo) as forwards:
        drawing.close()
        assert next(drawing, None) is None
        assert forwards["any"] == 0
    assert alone(turbo, [asked()]) == expected


@pytest.mark.usefixtures("_either_way")
def test_a_generator_that_rests_keeps_nobody_waiting(turbo: ZImagePipeline) -> None:
    """Nor do two that run at once, in two threads, with a call between."""
    requests = [asked(seed=seed, steps=2) for seed in range(3)]
    expected = alone(turbo, requests)
    resting = turbo.generate_many(requests)
    made = digests([next(resting)])
    others: list[list[str]] = []

    def work() -> None:
        others.append(digests(list(turbo.generate_many(requests))) + alone(turbo, requests[:1]))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert others == [expected + expected[:1]] * 2
    assert made + digests(list(resting)) == expected


@pytest.mark.usefixtures("_either_way")
def test_a_pipeline_that_is_closed_meanwhile(turbo_folder: Path) -> None:
    pipe = load(turbo_folder)
    drawing = pipe.generate_many(asked(seed=seed) for seed in range(3))
    next(drawing)
    pipe.close()
    with pytest.raises(RequestError, match="this pipeline was closed"):
        next(drawing)


def test_a_pipeline_that_is_converted_meanwhile(turbo_folder: Path) -> None:
    pipe, other = load(turbo_folder), load(turbo_folder).to(torch.bfloat16)
    drawing = pipe.generate_many([asked(), asked()])
    assert digests([next(drawing)]) == alone(pipe, [asked()])
    pipe.to(torch.bfloat16)
    assert digests([next(drawing)]) == alone(other, [asked()])


@pytest.mark.usefixtures("_either_way")
def test_a_cut_is_warned_of_where_the_picture_is_asked_for(turbo: ZImagePipeline) -> None:
    drawing = turbo.generate_many([asked(), asked("one two three " * 9, max_sequence_length=20)])
    with pytest.warns(ZImageWarning, match="this is cut off") as warned:
        list(drawing)
    assert [one.filename for one in warned] == [__file__]


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("stage", ["_hidden_states", "decode"])
def test_memory_that_runs_out_beside_a_step_ends_the_overlap(
    own_turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    requests = [asked(f"picture {seed}", seed=seed) for seed in range(4)]
    expected = alone(own_turbo, requests)
    own_turbo.text_encoder.forget()
    owner: Any = own_turbo.autoencoder if stage == "decode" else own_turbo.text_encoder
    compute, failures = getattr(owner, stage), []

    def fails(*given: Any) -> Any:
        if elsewhere():
            failures.append(given)
            raise OutOfMemoryError("Tried to allocate 5.00 GiB")
        return compute(*given)

    monkeypatch.setattr(owner, stage, fails)
    drawn = list(own_turbo.generate_many(requests))
    assert digests(drawn) == expected
    name = "decoding" if stage == "decode" else "prompt"
    said = f"{name} ran out of memory beside another picture at 64x64 (Tried to allocate 5.00 GiB); since then: one "
    assert [sentence for one in drawn for sentence in one.stepped_down] == [f"{said}after the other"]
    assert len(failures) == 1
    assert own_turbo.plan is not None
    assert own_turbo.plan.stepped_down == ()


@pytest.mark.usefixtures("beside")
def test_a_step_that_runs_out_of_memory_is_taken_again_alone(
    own_turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once what was beside it has ended, which here it cannot before the step has failed."""
    requests = [asked(seed=seed) for seed in range(3)]
    expected = alone(own_turbo, requests)
    denoise, decode = own_turbo.transformer.denoise, own_turbo.autoencoder.decode
    failed, decoded, order = threading.Event(), threading.Event(), []

    def slow(*given: Any) -> Any:
        if elsewhere():
            assert failed.wait(timeout=60)
            decoded.wait(timeout=0.05)
            order.append("decoded")
        return decode(*given)

    def fails(*given: Any) -> Any:
        order.append("denoise")
        if len(order) == 4:
            failed.set()
            raise OutOfMemoryError("Tried to allocate 5.00 GiB")
        return denoise(*given)

    monkeypatch.setattr(own_turbo.autoencoder, "decode", slow)
    monkeypatch.setattr(own_turbo.transformer, "denoise", fails)
    drawn = list(own_turbo.generate_many(requests))
    assert order == ["denoise"] * 4 + ["decoded"] + ["denoise"] * 6
    assert digests(drawn) == expected
    said = "denoising ran out of memory beside another picture at 64x64; since then: one after the other"
    assert [one.stepped_down for one in drawn] == [(said,), (), ()]


@pytest.mark.usefixtures("_either_way")
def test_what_stepped_down_is_told_with_its_picture(own_turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = own_turbo.autoencoder.decode, count()

    def fails(latents: Any, strip_levels: int = 0) -> Any:
        if next(calls) >= 1 and strip_levels < 1:
            raise OutOfMemoryError("Tried to allocate 5.00 GiB")
        return decode(latents, strip_levels)

    monkeypatch.setattr(own_turbo.autoencoder, "decode", fails)
    drawn = list(own_turbo.generate_many([asked(seed=seed, steps=1, height=256, width=256) for seed in range(3)]))
    assert drawn[0].stepped_down == ()
    assert "decoding ran out of memory at 256x256 (Tried to allocate 5.00 GiB); since" in drawn[1].stepped_down[-1]
    assert drawn[2].stepped_down == ()
    assert [one.image.recipe.runtime["decode"] for one in drawn] == ["whole", "1 in strips", "1 in strips"]


class OnDevice:
    """A tensor of a CUDA device, as far as `aside` looks."""

    is_cuda = True

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record_stream(self, stream: Any) -> None:
        self.log.append(f"kept for {stream.name}")


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        self.log.append(f"event of {self.name}")
        return "event"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for the {event}")

    def synchronize(self) -> None:
        self.log.append(f"{self.name} at rest")


@pytest.mark.parametrize("fails", [False, True])
def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """The order in which `aside` asks for events, of streams that only write down what they are asked."""
    log: list[str] = []
    side = Stream("side", log)
    monkeypatch.setattr(many_module, "side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main", log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(log.append(f"on {stream.name}")))

    def job() -> Any:
        log.append("job")
        if fails:
            raise OutOfMemoryError("none left")
        return "made", [OnDevice(log)]

    run = aside(torch.device("cuda", 0), job)
    assert log == ["event of main"]
    outcome = run()
    started = ["event of main", "on side", "side waits for the event", "job"]
    assert log == [*started, *([] if fails else ["kept for main"]), "side at rest"]
    assert outcome == (many_module.Failed("none left") if fails else "made")


@pytest.mark.usefixtures("beside")
def test_what_the_caller_set_for_its_thread_holds_beside_steps(
    own_turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, str]] = []
    decode = own_turbo._decode

    def watched(*args: Any) -> Any:
        seen.append((threading.current_thread() is threading.main_thread(), switch._mode.get()))
        return decode(*args)

    monkeypatch.setattr(own_turbo, "_decode", watched)
    with switch.using("off"):
        list(own_turbo.generate_many([asked(), asked("a cat")]))
    assert seen == [(False, "off"), (True, "off")]
