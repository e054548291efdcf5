"""Tiny random checkpoints of both variants, and pipelines over them that every test of a session shares.

The pipelines run in float32 on the CPU. No test changes their weights, precision or settings: one that does loads its
own from `turbo_folder` or `base_folder`.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels are run in Python

from zimage import ZImagePipeline
from zimage.testing import build_checkpoint
from zimage.testing.configs import SIZES

CountForwards = Callable[[ZImagePipeline], AbstractContextManager[Counter[str]]]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take long begin first, so that one of two workers does not end with them alone."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """The million objects of torch, diffusers and the tests stay: who looks for garbage need not look at them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Lines are not counted in tests that are marked so. pytest-cov stops its counting for them, but in one of several
    workers a second is under it, from before the worker was known as one, which goes on then."""
    if item.get_closest_marker("no_cover") is None:
        return (yield)
    usual, of_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(usual)
        threading.settrace(of_threads)


def load(folder: Path) -> ZImagePipeline:
    pipe = ZImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def turbo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("checkpoints") / "turbo", variant="turbo")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base", variant="base")


@pytest.fixture(scope="session")
def shallow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A turbo with the wide layers of `small`, but few of them and the image decoder of `tiny`: layers that are worth
    moving away and storing in fewer bits, in a picture that takes a moment."""
    tiny = SIZES["tiny"]
    shallow = replace(
        SIZES["small"], n_layers=4, n_refiner_layers=1, text_layers=4, vae_channels=tiny.vae_channels,
        vae_layers=tiny.vae_layers, vae_groups=tiny.vae_groups,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "small", shallow)
        return build_checkpoint(tmp_path_factory.mktemp("checkpoints") / "shallow", size="small")


@pytest.fixture(scope="session")
def turbo(turbo_folder: Path) -> ZImagePipeline:
    return load(turbo_folder)


@pytest.fixture(scope="session")
def base(base_folder: Path) -> ZImagePipeline:
    return load(base_folder)


@pytest.fixture
def own_turbo(turbo_folder: Path) -> ZImagePipeline:
    """A pipeline that a test may change; its text cache is empty."""
    return load(turbo_folder)


@pytest.fixture
def small() -> dict[str, Any]:
    """Options of a picture that takes a few milliseconds."""
    return {"height": 64, "width": 64, "any_size": True, "num_inference_steps": 2}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched; needs Triton."""
    from zimage.kernels import fused

    names: list[str] = []
    launch = fused._launch

    def note(kernel: Any, *args: Any, **constants: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *args, **constants)

    monkeypatch.setattr(fused, "_launch", note)
    return names


@pytest.fixture(scope="session")
def count_forwards() -> CountForwards:
    """Counts forward calls of every module of a pipeline, by "evaluation" (of the transformer), "text" (encodings of a
    prompt), "decoding" and "any"."""

    @contextmanager
    def counting(pipe: ZImagePipeline) -> Iterator[Counter[str]]:
        counter: Counter[str] = Counter()
        landmarks = {
            "evaluation": pipe.transformer.all_final_layer["2-1"].linear,
            "text": pipe.text_encoder.model,
            "decoding": pipe.autoencoder.vae.decoder,
        }

        def count(name: str) -> Callable[..., None]:
            return lambda *_: counter.update([name])

        models = (pipe.transformer, pipe.text_encoder.model, pipe.autoencoder.vae)
        modules = {id(module): module for model in models for module in model.modules()}
        hooks = [module.register_forward_pre_hook(count("any")) for module in modules.values()]
        hooks += [module.register_forward_pre_hook(count(name)) for name, module in landmarks.items()]
        try:
            yield counter
        finally:
            for hook in hooks:
                hook.remove()

    return counting


def uncounted() -> dict[str, str]:
    """The environment of a process whose lines are not counted, which would slow its imports: what it runs of the
    library is covered elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COV")}


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Runs code in a new Python process that treats warnings as errors, and returns what it printed."""

    def run(code: str, *arguments: object) -> str:
        process = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
            env={**uncounted(), "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    return run
