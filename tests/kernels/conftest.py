"""Kernels run on a CUDA device where there is one, else in Triton's interpreter (see the conftest above).

Without Triton there is nothing here to collect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def whole_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32 are that on a card too, which otherwise rounds what they multiply to ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 to bfloat16 and float8 rounds to the nearest, as on devices; Triton's interpreter cuts off. And what it
    multiplies of float8, widened to float16, keeps its NaN."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    bits = {
        "bf16": lambda wide: wide.bfloat16().view(torch.int16).numpy().view(np.uint16),
        "fp8e4nv": lambda wide: wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy(),
    }

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (str(source), str(target)) == ("fp8e4nv", "fp16"):
            narrow = torch.from_numpy(np.array(values)).view(torch.float8_e4m3fn)
            return narrow.half().view(torch.int16).numpy().view(np.uint16)
        if str(source) != "fp32" or str(target) not in bits:
            return convert(values, source, target, mode)
        return bits[str(target)](torch.from_numpy(np.array(values)))

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def noise(device: torch.device) -> Callable[..., torch.Tensor]:
    """Normal numbers of a shape, on the device and in a type, the same in each run."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return make


@pytest.fixture
def picture_noise(noise: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same, pictures (B, C, H, W) with their channels side by side."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = noise(*shape, dtype=dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    return make
