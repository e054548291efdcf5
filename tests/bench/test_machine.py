"""Which attention ran is what ran, and limits are rates of what was asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from zimage import ZImagePipeline
from zimage.bench import machine

CPU = torch.device("cpu")


def attend() -> None:
    tensors = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    scaled_dot_product_attention(*tensors)


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (SDPBackend.FLASH_ATTENTION, "_scaled_dot_product_flash_attention_for_cpu"),
        (SDPBackend.MATH, "_scaled_dot_product_attention_math"),
    ],
)
def test_the_attention_that_ran_is_named(backend: SDPBackend, name: str) -> None:
    with sdpa_kernel(backend):
        assert machine.attention_kernels(lambda: (attend(), attend()), CPU) == {name: 2}


def test_without_attention_there_is_none() -> None:
    assert machine.attention_kernels(lambda: torch.ones(3).sum(), CPU) == {}


def test_the_blocks_of_a_picture(turbo: ZImagePipeline) -> None:
    """Two of the noise refiner, two of the context refiner, two layers."""
    features = torch.randn(5, turbo.limits.caption_features)

    def draw() -> None:
        turbo(prompt_embeds=features, height=64, width=64, any_size=True, num_inference_steps=1, seed=1,
              output_type="latent", progress=False)  # fmt: skip

    assert sum(machine.attention_kernels(draw, CPU).values()) == 6


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128>, false>(Params)", "flash::flash_fwd_kernel"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEff::P)", "fmha_cutlassF_bf16_aligned_64x128_rf_sm80"),
        ("cudnn_generated_native_sdpa_sm90_flash_fprop_wgmma", "cudnn_generated_native_sdpa_sm90_flash_fprop_wgmma"),
    ],
)
def test_kernels_are_named_without_their_templates(name: str, short: str) -> None:
    assert machine.short_kernel(name) == short
    assert machine._KERNEL.search(name)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says 2 s for everything."""
    monkeypatch.setattr(machine, "LARGE", {"cpu": 32})
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 1000})

    def two_seconds(work: Callable[[], object], device: torch.device) -> tuple[float, object]:
        return 2.0, work()

    monkeypatch.setattr(machine, "timed", two_seconds)
    limits = machine.measure_limits(torch.float32, CPU, tokens=64, dim=16)
    assert limits.products == {"64x16x64": 64 * 16 * 64 / 1e12, "32x32x32": 32**3 / 1e12}
    assert limits.product_tflops == 64 * 16 * 64 / 1e12
    assert limits.copy_gbs == 1000 / 1e9


def test_the_machine_is_named() -> None:
    described = machine.describe(CPU)
    assert described["device"] == "cpu"
    assert described["name"]
    assert described["threads"] == torch.get_num_threads()
