"""A decode in strips: the whole one's pixels, whatever the height and the strips, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zimage import ZImagePipeline
from zimage.memory.meter import AllocationMeter
from zimage.memory.sizes import overlap
from zimage.models.autoencoder import Autoencoder
from zimage.models.strips import Statistics, decode_in_strips, encode_in_strips, norms, strips_of


def latents(height: int, width: int) -> Tensor:
    return torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("height", [4, 17, 50])
def test_the_pixels_of_a_whole_decode(base: ZImagePipeline, levels: int, height: int) -> None:
    decoder = base.autoencoder
    whole = decoder.decode(latents(height, 6))
    assert whole.std() > 0.05
    assert (decoder.decode(latents(height, 6), levels) - whole).abs().max() < 0.05 / 255


@pytest.mark.parametrize("rows", [1, 8, 40, 1000])
def test_strips_of_any_height(base: ZImagePipeline, rows: int) -> None:
    decoder = base.autoencoder.vae.decoder
    source = torch.randn(1, 32, 26, 10, generator=torch.Generator().manual_seed(1))  # before the last two levels
    with torch.no_grad():
        one, several = (decode_in_strips(decoder, source, 2, some) for some in (1000, rows))
    assert several.shape == (1, 3, 104, 40)
    assert (several - one).abs().max() < 1e-4


def test_half_precision_is_as_far_from_float32_as_a_whole_decode(base_folder: str) -> None:
    wide = ZImagePipeline.from_pretrained(base_folder, device="cpu", dtype="float32").autoencoder
    half = ZImagePipeline.from_pretrained(base_folder, device="cpu", dtype="bfloat16").autoencoder
    exact = wide.decode(latents(34, 8))
    whole, strips = ((half.decode(latents(34, 8), levels).float() - exact).square().mean().sqrt() for levels in (0, 2))
    assert 0.001 < whole < 0.01
    assert strips < 1.1 * whole


def test_less_memory(base: ZImagePipeline) -> None:
    peaks = []
    for levels in (0, 1, 2):
        with AllocationMeter() as meter:
            base.autoencoder.decode(latents(160, 8), levels)
        peaks.append(meter.peak)
    assert peaks[1] < 0.7 * peaks[0]
    assert peaks[2] < 0.7 * peaks[1]


def test_strips_cover_every_row_once_with_what_reaches_them() -> None:
    strips = list(strips_of(50, 16, 6))
    assert [(strip.first, strip.last) for strip in strips] == [(0, 16), (16, 32), (32, 48), (48, 50)]
    assert [(strip.begin, strip.end) for strip in strips] == [(0, 22), (10, 38), (26, 50), (42, 50)]
    rows = torch.arange(100.0)[None, None, :, None]  # twice the resolution
    assert strips[1].kept(rows[:, :, 20:76]).flatten().tolist() == list(range(32, 64))


def test_the_overlap_is_what_convolutions_reach() -> None:
    """A change of one row of the source changes no row of the picture farther away than the overlap."""
    assert [overlap(3, levels) for levels in (1, 2)] == [4, 6]


def test_how_many_norms(base: ZImagePipeline) -> None:
    decoder = base.autoencoder.vae.decoder
    assert norms(decoder, 1) == 1 + 2 * len(decoder.up_blocks[-1].resnets)


def test_statistics_merge_to_those_of_all() -> None:
    norm = nn.GroupNorm(4, 12)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    values = torch.randn(1, 12, 30, 5) * torch.arange(1.0, 31)[None, None, :, None] + 7
    parts = [Statistics.of(norm, values[:, :, rows]) for rows in (slice(0, 3), slice(3, 20), slice(20, 30))]
    merged = parts[0].merged(parts[1]).merged(parts[2])
    assert merged.count == 3 * 150
    torch.testing.assert_close(merged.normalize(norm, values), norm(values))


def test_a_vae_that_is_hooked_decodes_as_its_own_class_does(own_turbo: ZImagePipeline) -> None:
    vae = own_turbo.autoencoder.vae
    seen = []
    vae.decoder.conv_in.register_forward_hook(lambda *_: seen.append(1))
    whole = Autoencoder(vae).decode(latents(8, 8), 2)
    assert torch.equal(whole, Autoencoder(vae).decode(latents(8, 8)))
    assert len(seen) == 2


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("rows", [8, 24, 1000])
def test_an_encode_in_strips_is_the_whole_one(base: ZImagePipeline, levels: int, rows: int) -> None:
    encoder = base.autoencoder.vae.encoder
    pixels = torch.rand(1, 3, 176, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        whole = encoder.conv_in(pixels)
        for block in encoder.down_blocks[:levels]:
            whole = block(whole)
        strips = encode_in_strips(encoder, pixels, levels, rows)
    assert strips.shape == whole.shape
    assert (strips - whole).abs().max() < 1e-4 * whole.abs().max()


def test_less_memory_to_encode(base: ZImagePipeline) -> None:
    peaks, latents = [], []
    pixels, noise = torch.rand(1, 3, 1280, 64), torch.zeros(1, 16, 160, 8)
    for levels in (0, 1, 2):
        with AllocationMeter() as meter:
            latents.append(base.autoencoder.encode(pixels, noise, levels))
        peaks.append(meter.peak)
    assert peaks[1] < 0.7 * peaks[0]
    assert peaks[2] < 0.8 * peaks[1]
    for one in latents[1:]:
        assert (one - latents[0]).abs().max() < 1e-4 * latents[0].abs().max()
