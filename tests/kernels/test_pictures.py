"""Sums of pictures and biases, and pictures made twice the size: torch's numbers; and the decoder made of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d

from zimage import ZImagePipeline
from zimage.kernels import pictures
from zimage.kernels.switch import using
from zimage.models.autoencoder import Autoencoder
from zimage.models.pictures import upsample
from zimage.models.precision import Float32Math, cast

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


def folded(taps: Tensor, dim: int) -> Tensor:
    """Of three taps along `dim` the four that a transposed convolution has."""
    first, second, third = taps.unbind(dim)
    return torch.stack((third, second + third, first + second, first), dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (40, 33), (64, 96), (1, 1)], ids=str)
def test_taps_are_spread(noise: Noise, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Summed in float32 and rounded once, whichever way the weight lies."""
    weight = noise(*shape, 3, 3, dtype=dtype)
    expected = folded(folded(weight.float(), 3), 2).to(dtype).transpose(0, 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        result = pictures.spread(weight.contiguous(memory_format=layout))
        assert result is not None
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(result, expected)


@pytest.fixture
def enlarger(device: torch.device) -> Upsample2D:
    """With eight channels, and sixteen in its result."""
    torch.manual_seed(0)
    return Upsample2D(8, use_conv=True, out_channels=16).to(device)


def test_a_transposed_convolution_reads_nearest_pixels(noise: Noise, enlarger: Upsample2D) -> None:
    hidden, (weight, bias) = noise(2, 8, 5, 3), enlarger.conv.parameters()
    spread = pictures.spread(weight.detach())
    assert spread is not None
    torch.testing.assert_close(conv_transpose2d(hidden, spread, bias, stride=2, padding=1), enlarger(hidden))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_picture_of_twice_the_size(
    noise: Noise, enlarger: Upsample2D, launches: list[str], dtype: torch.dtype
) -> None:
    """As near to float32 as half precision is, which a CPU sums such products in; and so are rows of it, but for those
    where they were cut."""
    enlarger = enlarger.to(dtype)
    hidden = noise(1, 8, 9, 5, dtype=dtype)
    exact = copy.deepcopy(enlarger).float()(hidden.float())
    with using("on"):
        whole, rows = upsample(enlarger, hidden), upsample(enlarger, hidden[:, :, 2:7])
    assert launches == 2 * ["spread_taps", "add_elements"]
    assert whole.dtype == dtype
    for values, reference in ((whole, exact), (rows[:, :, 1:-1], exact[:, :, 5:13])):
        assert values.is_contiguous(memory_format=torch.channels_last)
        assert (values.float() - reference).norm() < torch.finfo(dtype).eps * reference.norm()


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
    weight = noise(8, 8, 3, 3)
    assert pictures.spread(weight.double()) is None
    assert pictures.spread(weight[:, :, :2]) is None
    assert pictures.spread(weight[..., 0]) is None
    assert pictures.spread(weight[:0]) is None
    assert pictures.spread(weight.transpose(0, 1)) is None


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
    """Each residual is one sum; biases that a norm adds cost no pass. What enlarges is torch's in float32."""
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
        assert launches.count("add_elements") > 0
        return
    residuals, upsamplers = counted(vae.decoder)
    by_itself = 0 if device.type == "cpu" else upsamplers  # a transposed convolution on a CPU
    assert len(biased) == 2 + by_itself  # the first and the last
    assert Counter(launches) == {
        "gather_groups": 2 * residuals + 1,
        "activate_groups": 2 * residuals + 1,
        "add_elements": residuals,
    }


def counted(decoder: Any) -> tuple[int, int]:
    """Its residuals and its upsamplers."""
    blocks = (decoder.mid_block, *decoder.up_blocks)
    return sum(len(block.resnets) for block in blocks), sum(len(block.upsamplers or ()) for block in blocks[1:])


@pytest.mark.no_cover  # lines are counted in `test_a_decode`
@pytest.mark.parametrize("strip_levels", [0, 1])
def test_a_decode_in_half_precision(
    base: ZImagePipeline, device: torch.device, noise: Noise, launches: list[str], strip_levels: int
) -> None:
    """About as near to float32 as without kernels; each enlargement by weights that are made for it."""
    latents, exact = noise(1, 16, 4, 2), copy.deepcopy(base.autoencoder.vae).to(device)
    vae = copy.deepcopy(exact)
    cast(vae, dtype=torch.bfloat16)
    decoded = []
    for mode, decoder in (("off", exact), ("off", vae), ("on", vae)):
        with using(mode):
            decoded.append(Autoencoder(decoder).decode(latents, strip_levels).float())
    whole, plain, result = decoded
    assert 0 < (result - whole).norm() < 1.5 * (plain - whole).norm()
    residuals, upsamplers = counted(vae.decoder)
    assert launches.count("spread_taps") >= upsamplers
    if not strip_levels:
        assert launches.count("spread_taps") == upsamplers
        assert launches.count("add_elements") == residuals + upsamplers


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


@pytest.mark.no_cover  # lines are counted in `test_a_decode`
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
