import pytest

from zimage.bench import machine


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and copies too small to say anything about the machine, and soon done."""
    monkeypatch.setattr(machine, "LARGE", {"cpu": 64})
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 4096})
