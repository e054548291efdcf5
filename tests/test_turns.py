"""Pipelines that share a module take turns at it, whichever it is; others do not wait, and none wait for each other."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from zimage import RequestError, ZImagePipeline
from zimage.turns import Turn

from .conftest import load

PARTS = ("vae", "text_encoder", "transformer")


def assembled(**parts: ZImagePipeline) -> ZImagePipeline:
    """A pipeline of the parts of others."""
    given: dict[str, Any] = {
        "vae": parts["vae"].autoencoder.vae,
        "text_encoder": parts["text_encoder"].text_encoder.model,
        "transformer": parts["transformer"].transformer,
    }
    return ZImagePipeline(3.0, tokenizer=parts["vae"].text_encoder.tokenizer, **given)


@pytest.mark.parametrize("shared", PARTS)
def test_pipelines_that_share_a_part_take_turns(turbo: ZImagePipeline, own_turbo: ZImagePipeline, shared: str) -> None:
    other = assembled(**{part: turbo if part == shared else own_turbo for part in PARTS})
    assert is_free(turbo._turn)
    with other._turn:
        assert not is_free(turbo._turn)
    assert is_free(turbo._turn)


def test_pipelines_of_their_own_do_not_wait(turbo: ZImagePipeline, turbo_folder: Path) -> None:
    with load(turbo_folder)._turn:
        assert is_free(turbo._turn)


def test_no_two_wait_for_each_other() -> None:
    one, other = nn.Identity(), nn.Identity()
    turns = Turn(one, other), Turn(other, one)

    def take(turn: Turn) -> None:
        for _ in range(2000):
            with turn, turn:
                pass

    threads = [threading.Thread(target=take, args=(turn,), daemon=True) for turn in turns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)


def test_who_is_interrupted_while_waiting_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __enter__(self) -> None:
            raise KeyboardInterrupt

        def __exit__(self, *_: object) -> None: ...

    turn = Turn(nn.Identity())
    broken = Turn(nn.Identity())
    monkeypatch.setattr(broken, "_locks", [*turn._locks, Interrupted()])
    with pytest.raises(KeyboardInterrupt), broken:
        pass
    assert is_free(turn)


@pytest.mark.parametrize("send", [pickle.dumps, copy.deepcopy])
def test_a_pipeline_is_not_sent_elsewhere(turbo: ZImagePipeline, monkeypatch: pytest.MonkeyPatch, send: Any) -> None:
    """And that is said before its models are written."""
    monkeypatch.setattr(nn.Module, "__reduce_ex__", lambda *_: pytest.fail("models are copied"))
    with pytest.raises(RequestError, match="load the model there"):
        send(turbo)


def is_free(turn: Turn) -> bool:
    """Whether another thread can take it now."""

    def taken() -> bool:
        locks = []
        for lock in turn._locks:
            if lock.acquire(blocking=False):
                locks.append(lock)
        for lock in locks:
            lock.release()
        return len(locks) == len(turn._locks)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(taken).result()
