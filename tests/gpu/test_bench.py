"""What `zimage bench` sees on CUDA only: kernels, and memory that was allocated."""

import pytest

from zimage.bench.measure import run
from zimage.bench.settings import Settings

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("variant", ["turbo", "base"])
def test_kernels_and_memory(variant: str) -> None:
    report = run(Settings(size="small", variant=variant, device="cuda", height=256, width=256, steps=2, rounds=2))
    for stage in report.stages:
        assert stage.diffusers is not None
        assert stage.cosine is not None
        assert stage.cosine >= 0.99
        assert len(stage.peaks) == 2
        assert min(stage.peaks) > 135e6 * 2  # the weights alone, in 16 bits
        assert 0 < stage.zimage.product_share < 1.5
    for seen in report.attention.values():
        assert any(name.startswith("_scaled_dot_product") for name in seen)
        fused = not any(name == "_scaled_dot_product_attention_math" for name in seen)
        assert any(name.startswith("kernel:") for name in seen) == fused
