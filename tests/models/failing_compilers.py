"""Compilers that fail, while they compile; `test_compiled` runs this in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from zimage import ZImageWarning
from zimage.memory.ladder import is_out_of_memory
from zimage.models.compiled import compile_blocks, is_compiled

from .test_compiled import CALL, doubling, latents, load

__all__ = ["doubling"]


def test_memory_of_the_device_that_runs_out_is_no_failure_to_compile(doubling: tuple[Any, Any]) -> None:
    def fail(graph: Any, inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    transformer, inputs = doubling
    compile_blocks(transformer, fail)
    with pytest.raises(RuntimeError) as raised:
        transformer._run_block(*inputs)
    assert is_out_of_memory(raised.value)
    assert is_compiled(transformer)


def test_where_compiling_fails_a_line_says_why_and_pictures_are_made(turbo_folder: Path) -> None:
    pipe = load(turbo_folder)
    expected = latents(pipe)

    def fail(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("cc1plus: out of memory allocating 65536 bytes\nfurther lines")

    compile_blocks(pipe.transformer, fail)
    with pytest.warns(ZImageWarning) as warned:
        image = pipe("a fox", progress=False, **CALL).images[0]  # type: ignore[union-attr]
    (said,) = (str(one.message) for one in warned)
    assert "computed as they are: RuntimeError: cc1plus: out of memory allocating 65536 bytes (" in said
    assert "further" not in said
    assert image.recipe.runtime["blocks"] == "eager"
    assert not pipe.compiled
    assert torch.equal(latents(pipe), expected)
    assert pipe.plan is not None
    assert pipe.plan.stepped_down == ()


def test_a_default_device_that_torch_cannot_compile_with_is_such_a_failure(turbo_folder: Path) -> None:
    pipe = load(turbo_folder)
    expected = latents(pipe)
    compile_blocks(pipe.transformer, "eager")
    with torch.device("cpu"), pytest.warns(ZImageWarning, match="computed as they are: ConstraintViolationError"):
        assert torch.equal(latents(pipe), expected)
