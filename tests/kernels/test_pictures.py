"""Sums of pictures and biases, and pictures of twice the size: torch's bits; and the decoder that is made of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from zimage import ZImagePipeline
from zimage.kernels import pictures
from zimage.kernels.switch import using
from zimage.models.autoencoder import Autoencoder
from zimage.models.precision import Float32Math

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Noise = Callable[..., Tensor]


@pytest.fixture
def noise(picture_noise: Noise) -> Noise:
    return picture_noise


def added(values: Tensor, bias: Tensor | None) -> Tensor:
    return values if bias is None else values + bias[:, None, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 32, 8, 16), (2, 3, 29, 31), (1, 24, 100, 1)], ids=str)
def test_sums_round_as_torch_does(noise: Noise, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """In blocks that are full and in one that is not, of channels that divide it and do not."""
    bias, hidden_bias = noise(shape[1], dtype=dtype), noise(shape[1], dtype=dtype)
    for one, hidden, other in (
        (bias, noise(*shape, dtype=dtype), hidden_bias),
        (bias, noise(*shape, dtype=dtype), None),
        (None, noise(*shape, dtype=dtype), None),
        (bias, None, None),
    ):
        update = noise(*shape, dtype=dtype)
        expected = added(update, one)
        expected = expected if hidden is None else expected + added(hidden, other)
        given = None if hidden is None else hidden.clone()
        result = pictures.add(update, one, hidden, other)
        assert result is update
        assert torch.equal(result, expected)
        assert hidden is None or torch.equal(hidden, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 32, 5, 7), (2, 24, 3, 2), (1, 1, 1, 1), (1, 512, 4, 6)], ids=str)
def test_each_pixel_four_times(noise: Noise, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    hidden = noise(*shape, dtype=dtype)
    result = pictures.double(hidden)
    assert result is not None
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, interpolate(hidden, scale_factor=2.0, mode="nearest"))


def test_what_they_were_not_written_for_is_left_to_torch(noise: Noise) -> None:
    update, bias = noise(1, 16, 4, 4), noise(16)
    assert pictures.add(update.contiguous(), bias) is None
    assert pictures.add(update, noise(8)) is None
    assert pictures.add(update, bias.half()) is None
    assert pictures.add(update, bias, update.contiguous()) is None
    assert pictures.add(update, bias, noise(1, 16, 4, 8)) is None
    assert pictures.add(update, bias, update.half()) is None
    assert pictures.add(update, bias, update, noise(8)) is None
    assert pictures.add(update.double(), bias.double()) is None
    assert pictures.double(update.contiguous()) is None
    assert pictures.double(noise(1, 8192, 1, 2)) is None


def test_pixels_that_32_bits_do_not_count(monkeypatch: pytest.MonkeyPatch, noise: Noise) -> None:
    monkeypatch.setattr(pictures, "MOST_PIXELS", 4 * 35)
    assert pictures.double(noise(1, 16, 5, 7)) is None
    assert pictures.double(noise(1, 16, 2, 17)) is not None


def test_float32_math_widens_biases(noise: Noise) -> None:
    update, hidden, bias = noise(1, 16, 4, 4), noise(1, 16, 4, 4), noise(16).half()
    expected = added(update, bias.float()) + added(hidden, bias.float())
    with Float32Math():
        result = pictures.add(update, bias, hidden, bias)
    assert result is not None
    assert torch.equal(result, expected)


@pytest.mark.parametrize("strip_levels", [0, 1])
def test_a_decode(
    base: ZImagePipeline, device: torch.device, noise: Noise, launches: list[str], strip_levels: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each residual is one sum, each enlargement one kernel; biases that a norm adds cost no pass."""
    vae = copy.deepcopy(base.autoencoder.vae).to(device)
    latents = noise(1, 16, 4, 2)
    with using("off"):
        expected = Autoencoder(vae).decode(latents, strip_levels)
    assert not launches
    biased: list[int] = []
    convolve = nn.Conv2d._conv_forward

    def noted(module: nn.Conv2d, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        biased.extend([] if bias is None else [1])
        return convolve(module, hidden, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", noted)
    with using("on"):
        result = Autoencoder(vae).decode(latents, strip_levels)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    if strip_levels:
        assert min(map(launches.count, ("add_elements", "double_pixels"))) > 0
        return
    assert len(biased) == 2  # the first and the last
    blocks = (vae.decoder.mid_block, *vae.decoder.up_blocks)
    residuals = sum(len(block.resnets) for block in blocks)
    upsamplers = sum(len(block.upsamplers or ()) for block in vae.decoder.up_blocks)
    assert Counter(launches) == {
        "gather_groups": 2 * residuals + 1,
        "activate_groups": 2 * residuals + 1,
        "add_elements": residuals + upsamplers,
        "double_pixels": upsamplers,
    }


def test_an_encode(base: ZImagePipeline, device: torch.device, noise: Noise, launches: list[str]) -> None:
    vae = copy.deepcopy(base.autoencoder.vae).to(device)
    pixels, sampled = noise(1, 3, 16, 24).sigmoid(), noise(1, 16, 2, 3)
    encoded = []
    for mode in ("off", "on"):
        with using(mode):
            encoded.append(Autoencoder(vae).encode(pixels, sampled))
    torch.testing.assert_close(encoded[1], encoded[0], rtol=1e-4, atol=1e-5)
    assert launches.count("add_elements") == sum(
        len(block.resnets) for block in (vae.encoder.mid_block, *vae.encoder.down_blocks)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_decode_in_float32_after_an_overflow(
    base: ZImagePipeline, device: torch.device, noise: Noise, launches: list[str], dtype: torch.dtype
) -> None:
    vae = copy.deepcopy(base.autoencoder.vae).to(device, dtype)
    latents = noise(1, 16, 4, 2)
    results = []
    for mode in ("off", "on"):
        with using(mode), Float32Math():
            results.append(Autoencoder(vae).decode(latents))
    assert results[1].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)
    assert launches.count("add_elements") > 0
