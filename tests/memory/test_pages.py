"""Layers lie together in page-locked memory so that torch, which takes it in powers of two, takes least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage import ZImageWarning
from zimage.memory import pages
from zimage.memory.pages import all_locked, locked, together
from zimage.memory.ring import ALIGNMENT, host_buffers

MIB = 2**20


def test_a_size_is_rounded_up() -> None:
    assert [locked(size) for size in (0, 1, 2, 3, 2.5, 4, 337.53 * MIB)] == [0, 1, 2, 4, 4, 4, 512 * MIB]


def test_blocks_lie_in_threes_and_text_layers_in_fives() -> None:
    assert together([337.53 * MIB] * 7) == [3, 3, 1]
    assert together([192.51 * MIB] * 10) == [5, 5]
    assert together([256 * MIB] * 3) == [1, 1, 1]


def divisions(sizes: Sequence[int]) -> Iterator[list[Sequence[int]]]:
    """All ways to divide `sizes` into groups of neighbours."""
    if not sizes:
        yield []
    for count in range(1, len(sizes) + 1):
        yield from ([sizes[:count], *rest] for rest in divisions(sizes[count:]))


@given(st.lists(st.integers(1, 70), max_size=8))
def test_no_other_way_takes_less(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "MOST", 64)
        allowed = (
            groups for groups in divisions(sizes) if all(sum(group) <= 64 or len(group) == 1 for group in groups)
        )
        assert all_locked.__wrapped__(tuple(sizes)) == min(
            sum(locked(sum(group)) for group in groups) for groups in allowed
        )
        counts = together(sizes)
    assert sum(counts) == len(sizes)


def test_buffers_are_parts_of_few_that_are_made_when_it_comes_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    empty = torch.empty

    def note(size: int, *, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        assert pin_memory
        made.append(size)
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", note)
    sizes = [1200, 1201, 1280, 1200]
    buffers = host_buffers(sizes, for_card=True)
    first = next(buffers)
    assert made == [3 * 1280]  # for three of them, each of which begins at a multiple of 256
    rest = list(buffers)
    assert made == [3 * 1280, 1280]
    assert [one.numel() for one in (first, *rest)] == sizes
    for number, one in enumerate((first, *rest)):
        one.fill_(number)
        assert one.is_contiguous()
        assert one.storage_offset() % ALIGNMENT == 0
    assert [{*one.tolist()} for one in (first, *rest)] == [{0}, {1}, {2}, {3}]


def test_where_there_is_no_more_of_it_the_rest_is_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    locked_until_now: list[int] = []
    empty, said = torch.empty, "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"

    def scarce(size: int, *, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory and locked_until_now:
            raise RuntimeError(said)
        locked_until_now.extend([size] if pin_memory else [])
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", scarce)
    sizes = [1280, 1280, 1280, 2048, 700]
    with pytest.warns(
        ZImageWarning, match=r"no more page-locked memory \(CUDA error: out of memory\); weights wait in ordinary"
    ):
        buffers = list(host_buffers(sizes, for_card=True))
    assert [one.numel() for one in buffers] == sizes
    assert len(locked_until_now) == 1
    said = "CUDA error: invalid argument"
    with pytest.raises(RuntimeError, match="invalid argument"):
        list(host_buffers(sizes, for_card=True))


def test_other_buffers_are_apart() -> None:
    one, two = host_buffers([5, 7], for_card=False)
    assert (one.numel(), two.numel()) == (5, 7)
    assert one.untyped_storage().data_ptr() != two.untyped_storage().data_ptr()
