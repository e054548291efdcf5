"""How much memory there is to plan with, and how much is in use: of the device and of the host, on this machine."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import torch

from .ladder import release
from .plan import Budget, parse_memory

_CGROUP = Path("/sys/fs/cgroup")


def find_budget(memory: str | int, device: torch.device, *, loaded: bool = False) -> Budget:
    """What a plan for `device` may use: of what is free now, at most `memory` ("auto" or an amount, see
    `parse_memory`), less a margin; and of the host's memory what is free.

    What tensors of this process hold on a card is in use, by another model perhaps; with `loaded` it is the planned
    model's own. Raises `RequestError` for a `memory` that is no amount.
    """
    wanted = parse_memory(memory)
    if device.type == "cuda" and not loaded and torch.cuda.memory_reserved(device):
        release()  # of a model that was there before, on the host too
    host = free_host_memory()
    if device.type == "cuda":
        held = 0 if loaded else torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
        return Budget.of_card(free if wanted is None else min(wanted, free), host, str(memory))
    return Budget.of_host(host if wanted is None else min(wanted, host), str(memory))


def free_host_memory() -> int:
    """Bytes of the host's memory that are free, within the limit of a container where there is one.

    A container counts what the system keeps of files as used, a checkpoint that was read among them; it gives that up
    for whoever needs memory, so it is free here, as it is outside of one.
    """
    free = psutil.virtual_memory().available
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    if limit == "max":
        return free
    files = sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))
    return min(free, max(0, int(limit) - max(0, int(used) - files)))


def held_memory(device: torch.device) -> int:
    """Bytes that tensors of this process hold on `device`; where it is the host, all that the process does."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def peak_memory(device: torch.device) -> int | None:
    """The most of `held_memory` there was since the process began; `None` where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(peak[1]) * 1024 if peak else None
