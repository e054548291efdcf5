"""The meter sees what is made and dropped, and enforces what it is given."""

from __future__ import annotations

import pytest
import torch

from zimage.memory.meter import AllocationMeter


def test_live_and_peak_follow_what_is_made_and_dropped() -> None:
    with AllocationMeter() as meter:
        one = torch.zeros(1000)
        assert meter.live == 4000
        two = one + 1
        del one
        assert (meter.live, meter.peak) == (4000, 8000)
        meter.reset_peak()
        assert meter.peak == 4000
    del two
    assert meter.live == 0


def test_views_and_work_in_place_take_nothing() -> None:
    given = torch.zeros(10, 10)
    with AllocationMeter() as meter:
        given.add_(1).view(100)[3:].mul_(2)
        assert (meter.live, meter.allocations) == (0, 0)
        made = given.t().contiguous()
        made[0].add_(1)
        assert (meter.live, meter.allocations) == (400, 1)


def test_what_was_there_before_counts_once_adopted() -> None:
    weight = torch.zeros(50)
    meter = AllocationMeter(capacity=600)
    meter.adopt([weight, weight[:10]])
    assert meter.live == 200
    with meter, pytest.raises(torch.OutOfMemoryError, match="800 bytes are wanted, 200 of 600 are in use"):
        torch.zeros(200)
    del weight
    with meter:
        assert torch.zeros(150).numel() == 150


def test_an_allocation_can_be_made_to_fail() -> None:
    meter = AllocationMeter(fail_at=3)
    with meter:
        made = [torch.zeros(1), torch.zeros(1)]
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1)
        assert len([*made, torch.zeros(1)]) == 3


def test_it_counts_where_nothing_is_computed() -> None:
    with AllocationMeter() as meter:
        torch.empty(1 << 30, device="meta", dtype=torch.bfloat16)
    assert (meter.live, meter.peak) == (0, 2 << 30)
