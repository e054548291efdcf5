"""Which layers lie together in page-locked memory of the host, of which torch takes powers of two.

A layer of 338 MiB alone takes 512 of it, three together take 1024. Pure arithmetic, no torch: `ring` allocates by it,
`peaks` counts by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import ceil

MOST = 2**31
"""Bytes of layers that lie together; one that is more lies alone. Three times two models' blocks, which a plan for both
counts as one."""


def locked(size: float) -> int:
    """Bytes that torch takes for so many: the next power of two (`CachingHostAllocator.h`)."""
    return 1 << (ceil(size) - 1).bit_length() if size else 0


def together(sizes: Sequence[float]) -> list[int]:
    """How many layers of these bytes, in this order, lie together each time, so that all take the least memory."""
    least, begins = [0], [0]  # of the first layers, and where the last group of them begins
    for end in range(1, len(sizes) + 1):
        total, best = 0.0, (float("inf"), end - 1)
        for begin in range(end - 1, -1, -1):
            total += sizes[begin]
            if total > MOST and begin < end - 1:
                break
            best = min(best, (least[begin] + locked(total), begin), key=lambda found: found[0])
        least.append(int(best[0]))
        begins.append(best[1])
    bounds = [len(sizes)]
    while bounds[-1]:
        bounds.append(begins[bounds[-1]])
    return [last - first for first, last in pairwise(reversed(bounds))]


@lru_cache(256)
def all_locked(sizes: tuple[float, ...]) -> int:
    """Bytes that layers take which lie so. Whoever plans asks many times for the same."""
    found, begin = 0, 0
    for count in together(sizes):
        found += locked(sum(sizes[begin : begin + count]))
        begin += count
    return found
