"""A picture can be stopped from another thread: within one step, with nothing written, and the pipeline works on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from zimage import Cancelled, GenerationRequest, ZImagePipeline
from zimage.files.recipe import pixel_digest

from .conftest import CountForwards


def digest(pipe: ZImagePipeline, small: dict[str, Any], **options: Any) -> str:
    return pixel_digest(pipe("a fox", **small, seed=7, **options).images[0])


def test_an_event_set_by_another_thread_stops_the_picture_within_a_step(
    turbo: ZImagePipeline, small: dict[str, Any], tmp_path: Path, count_forwards: CountForwards
) -> None:
    before = digest(turbo, small)
    cancel, third_step_is_done = threading.Event(), threading.Event()

    def presses_cancel() -> None:
        third_step_is_done.wait(timeout=60)
        cancel.set()

    def wait_at_the_third_step(pipe: Any, step: int, timestep: Any, tensors: Any) -> None:
        if step == 2:
            third_step_is_done.set()
            cancel.wait(timeout=60)

    user = threading.Thread(target=presses_cancel)
    user.start()
    options = {**small, "num_inference_steps": 500, "callback_on_step_end": wait_at_the_third_step}
    with count_forwards(turbo) as forwards, pytest.raises(Cancelled, match="cancelled; nothing was written"):
        turbo("a fox", **options, cancel=cancel).images[0].save(tmp_path / "fox.png")
    user.join()
    assert (forwards["evaluation"], forwards["decoding"]) == (3, 0)
    assert list(tmp_path.iterdir()) == []
    assert digest(turbo, small) == before
    assert digest(turbo, small, cancel=threading.Event()) == before


def test_nothing_is_computed_for_a_picture_that_was_cancelled_before(
    own_turbo: ZImagePipeline, small: dict[str, Any], count_forwards: CountForwards
) -> None:
    cancel = threading.Event()
    cancel.set()
    with count_forwards(own_turbo) as forwards:
        for start in (
            lambda: own_turbo("a fox", **small, cancel=cancel),
            lambda: next(own_turbo.stream(GenerationRequest("a fox", **small), cancel=cancel)),
        ):
            with pytest.raises(Cancelled):
                start()
    assert forwards["any"] == 0


def test_a_picture_cancelled_in_its_last_step_is_not_decoded(
    turbo: ZImagePipeline, small: dict[str, Any], count_forwards: CountForwards
) -> None:
    cancel = threading.Event()

    def set_at_the_last(pipe: Any, step: int, timestep: Any, tensors: Any) -> None:
        if step == 1:
            cancel.set()

    with count_forwards(turbo) as forwards, pytest.raises(Cancelled):
        turbo("a fox", **small, cancel=cancel, callback_on_step_end=set_at_the_last)
    assert (forwards["evaluation"], forwards["decoding"]) == (2, 0)


def test_the_second_image_of_a_call_is_cancelled_too(
    turbo: ZImagePipeline, small: dict[str, Any], count_forwards: CountForwards
) -> None:
    class InTheSecondImage:
        """Whatever says `is_set` will do."""

        def is_set(self) -> bool:
            return forwards["evaluation"] == 3

    with count_forwards(turbo) as forwards, pytest.raises(Cancelled):
        turbo("a fox", **small, num_images_per_prompt=3, cancel=InTheSecondImage())
    assert (forwards["evaluation"], forwards["decoding"]) == (3, 1)


def test_a_stream_and_a_replay_are_cancelled_by_their_event(turbo: ZImagePipeline, small: dict[str, Any]) -> None:
    image = turbo("a fox", **small, seed=7).images[0]
    cancel = threading.Event()
    stream = turbo.stream(GenerationRequest("a fox", **small), cancel=cancel)
    next(stream)
    cancel.set()
    with pytest.raises(Cancelled):
        next(stream)
    with pytest.raises(Cancelled):
        turbo.replay(image.recipe, cancel=cancel)
    cancel.clear()
    assert turbo.replay(image.recipe, cancel=cancel).same_bits


def test_a_picture_that_is_there_is_not_lost_to_a_late_cancel(turbo: ZImagePipeline, small: dict[str, Any]) -> None:
    cancel = threading.Event()
    for step in turbo.stream(GenerationRequest("a fox", **small, seed=7), cancel=cancel):
        if step.image is not None:
            cancel.set()
    assert step.image is not None
    assert step.image.tobytes() == turbo("a fox", **small, seed=7).images[0].tobytes()


def test_one_call_is_cancelled_and_the_one_beside_it_is_not(turbo: ZImagePipeline, small: dict[str, Any]) -> None:
    expected = digest(turbo, {**small, "num_inference_steps": 40})
    cancel, both_run = threading.Event(), threading.Barrier(2)
    outcomes: dict[str, object] = {}

    def meet(pipe: Any, step: int, timestep: Any, tensors: Any) -> None:
        if step == 3:
            both_run.wait(timeout=60)

    def draw(name: str, **options: Any) -> None:
        call = {**small, "num_inference_steps": 40, "callback_on_step_end": meet, **options}
        try:
            outcomes[name] = digest(turbo, call)
        except Cancelled:
            outcomes[name] = "cancelled"

    def meet_and_cancel(*given: Any) -> None:
        meet(*given)
        if given[1] == 5:
            cancel.set()

    stopped = threading.Thread(
        target=draw, args=("stopped",), kwargs={"cancel": cancel, "callback_on_step_end": meet_and_cancel}
    )
    stopped.start()
    draw("finished")
    stopped.join()
    assert outcomes == {"finished": expected, "stopped": "cancelled"}
