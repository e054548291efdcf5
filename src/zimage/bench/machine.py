"""What this machine does at best, and which attention kernels ran on it: observed, never guessed.

A matrix product and a copy are timed in the run whose speed they are the scale of. Knows nothing of pipelines.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

REPEATS = 10
LARGE = {"cuda": 8192, "cpu": 1024, "mps": 2048}
"""Rows of the large square product: enough to reach a device's rate, few enough for a second or two."""
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26, "mps": 2**28}
_OPERATION = re.compile(r"^aten::_scaled_dot_product|flash_attn|sage|xformers|flex_attention")
_KERNEL = re.compile(r"flash|fmha|sdpa|attn|attention|attend_", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the device did, medians: matrix products, the best of several shapes, and a copy on the device.

    `product_tflops` is in 10^12 operations a second, `copy_gbs` in 10^9 bytes read and written a second.
    """

    product_tflops: float
    products: dict[str, float]
    copy_gbs: float


def measure_limits(dtype: torch.dtype, device: torch.device, tokens: int, dim: int) -> Limits:
    """Time products of `tokens` tokens with a layer from `dim` to 4 · `dim`, and of two large square matrices."""
    large = LARGE.get(device.type, LARGE["cpu"])
    shapes = {f"{tokens}x{dim}x{4 * dim}": (tokens, dim, 4 * dim), f"{large}x{large}x{large}": (large,) * 3}
    products = {}
    for name, (rows, inner, columns) in shapes.items():
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(columns, inner, device=device, dtype=dtype).t()  # as a linear layer holds its weight
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        seconds = median_time(partial(torch.mm, left, right, out=out), device)
        products[name] = 2 * rows * inner * columns / seconds / 1e12
    size = COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = median_time(lambda: target.copy_(source), device)
    return Limits(product_tflops=max(products.values()), products=products, copy_gbs=2 * size / copying / 1e9)


def median_time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, the median of `REPEATS` after one that is not counted."""
    work()
    return statistics.median(timed(work, device)[0] for _ in range(REPEATS))


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that `work` took, to its end on the device, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device) -> None:
    """Wait for a device that works on its own; a CPU does not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def attention_kernels(work: Callable[[], object], device: torch.device) -> dict[str, int]:
    """How often each attention ran within `work`, as torch's profiler saw it: torch's own operations by name
    (`_scaled_dot_product_flash_attention`, `_scaled_dot_product_attention_math`), those of other libraries, and on a
    CUDA device the kernels, after "kernel:", less their template arguments."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it says on stderr that it starts and that it stops
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, acc_events=True) as profiled:
        work()
        synchronize(device)
    seen: Counter[str] = Counter()
    for event in profiled.events():
        on_device = event.device_type.name != "CPU"
        if on_device and _KERNEL.search(event.name):
            seen[f"kernel:{short_kernel(event.name)}"] += 1
        elif not on_device and _OPERATION.search(event.name):
            seen[event.name.removeprefix("aten::")] += 1
    return dict(seen)


def short_kernel(name: str) -> str:
    """A kernel's name without return type, template arguments and parameters."""
    return re.split(r"[<(]", name.removeprefix("void "), maxsplit=1)[0].strip() or name


def device_name(device: torch.device) -> str:
    """The card, or the model of the CPU as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines: Sequence[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = ()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else platform.processor()) or platform.machine()


def describe(device: torch.device) -> dict[str, str | int]:
    """The machine, as results name it."""
    return {
        "device": device.type,
        "name": device_name(device),
        "platform": platform.platform(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }
