"""Tests that need a CUDA device; without one there is nothing here to collect. `make gpu` runs them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture
def no_grad() -> Iterator[None]:
    """For tests that call what is below a pipeline."""
    with torch.no_grad():
        yield
