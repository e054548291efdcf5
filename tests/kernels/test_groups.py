"""Group norm with SiLU beside torch's own, at every layout of tiles and parts, and in the decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import group_norm, silu

from zimage import ZImagePipeline
from zimage.kernels import fused, groups
from zimage.kernels.switch import using
from zimage.models.autoencoder import Autoencoder
from zimage.models.layers import activate
from zimage.models.precision import Float32Math

pytestmark = pytest.mark.no_cover  # lines are counted in `test_pictures` and `test_fused`; here that doubles the time
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def noise(picture_noise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return picture_noise


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, count: int) -> Tensor:
    """In float32, rounded where the kernel rounds."""
    normal = group_norm(hidden.float().contiguous(), count, weight.float(), bias.float(), 1e-6).to(hidden.dtype)
    return silu(normal.float()).to(hidden.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "count"),
    [((1, 128, 9, 7), 32), ((2, 16, 33, 40), 8), ((1, 512, 3, 3), 32), ((1, 32, 1, 2), 32)],
    ids=str,
)
def test_activate_groups(noise: Callable[..., Tensor], dtype: torch.dtype, shape: tuple[int, ...], count: int) -> None:
    hidden = 3.0 * noise(*shape, dtype=dtype) + 5.0
    weight, bias = noise(shape[1], dtype=dtype), noise(shape[1], dtype=dtype)
    given = hidden.clone()
    result = fused.activate_groups(hidden, weight, bias, count, 1e-6)
    assert result is not None
    assert (result.dtype, result.shape) == (dtype, hidden.shape)
    assert result.is_contiguous(memory_format=torch.channels_last)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(result, plain(hidden, weight, bias, count), rtol=max(1e-5, 2 * step), atol=2e-5)
    assert torch.equal(hidden, given)
    again = fused.activate_groups(hidden, weight, bias, count, 1e-6)
    assert again is not None
    assert torch.equal(again, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "count"), [((1, 128, 9, 7), 32), ((2, 16, 33, 40), 8)], ids=str)
def test_a_bias_is_added_before(
    noise: Callable[..., Tensor], dtype: torch.dtype, shape: tuple[int, ...], count: int
) -> None:
    """To the bit what the norm of torch's sum gives, also at the pixels that fill up the last tile."""
    hidden, added = noise(*shape, dtype=dtype), 9.0 * noise(shape[1], dtype=dtype)
    weight, bias = noise(shape[1], dtype=dtype), noise(shape[1], dtype=dtype)
    given = hidden.clone()
    result = fused.activate_groups(hidden, weight, bias, count, 1e-6, added)
    expected = fused.activate_groups(hidden + added[:, None, None], weight, bias, count, 1e-6)
    assert result is not None
    assert expected is not None
    assert torch.equal(result, expected)
    assert torch.equal(hidden, given)


@pytest.mark.parametrize(("tile", "parts"), [(256, 1), (256, 2), (256, 3), (256, 512), (32, 512)])
def test_parts_are_joined(noise: Callable[..., Tensor], tile: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of several tiles, in programs that have one or several of them, the last not full, and of more programs
    than are joined at a time."""
    monkeypatch.setattr(fused, "TILE", tile)
    monkeypatch.setattr(fused, "MOST_PARTS", parts)
    hidden, weight, bias = noise(1, 32, 11, 9) * 2.0 - 7.0, noise(32), noise(32)
    assert tile == 256 or hidden[0, 0].numel() > groups.JOINED.value
    result = fused.activate_groups(hidden, weight, bias, 8, 1e-6)
    torch.testing.assert_close(result, plain(hidden, weight, bias, 8), rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_zero_costs_no_digits(noise: Callable[..., Tensor]) -> None:
    hidden, weight, bias = noise(1, 32, 64, 64) + 1000.0, torch.ones(32), torch.zeros(32)
    weight, bias = weight.to(hidden.device), bias.to(hidden.device)
    result = fused.activate_groups(hidden, weight, bias, 8, 1e-6)
    expected = silu(group_norm(hidden.double().contiguous(), 8, weight.double(), bias.double(), 1e-6)).float()
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def test_what_it_was_not_written_for_is_left_to_torch(noise: Callable[..., Tensor]) -> None:
    weight, bias = noise(16), noise(16)
    assert fused.activate_groups(noise(1, 16, 4, 4).contiguous(), weight, bias, 8, 1e-6) is None
    assert fused.activate_groups(noise(1, 16, 4, 4), noise(8), bias, 8, 1e-6) is None
    assert fused.activate_groups(noise(1, 16, 4, 4), weight, noise(8), 8, 1e-6) is None
    assert fused.activate_groups(noise(1, 24, 4, 4), noise(24), noise(24), 8, 1e-6) is None
    assert fused.activate_groups(noise(1, 16, 4, 4), weight, bias, 5, 1e-6) is None
    assert fused.activate_groups(noise(1, 16, 4, 4).double(), weight, bias, 8, 1e-6) is None
    assert fused.activate_groups(noise(16, 4), weight, bias, 8, 1e-6) is None
    assert fused.activate_groups(noise(1, 16, 4, 4), weight, bias, 8, 1e-6, noise(8)) is None
    assert fused.activate_groups(noise(1, 16, 4, 4), weight, bias, 8, 1e-6, bias.half()) is None


def test_only_plain_group_norms_are_fused(noise: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    kernel = fused.activate_groups
    monkeypatch.setattr(fused, "activate_groups", lambda *args: asked.append(1) or kernel(*args))
    hidden = noise(1, 16, 4, 4)
    norms = [nn.GroupNorm(8, 16).to(hidden.device) for _ in range(2)]
    norms[1].register_forward_hook(lambda *_: None)
    bare = nn.GroupNorm(8, 16, affine=False)
    with using("on"):
        results = [activate(norm, hidden) for norm in (*norms, bare, nn.Identity())]
    assert len(asked) == 1
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    with using("off"):
        activate(norms[0], hidden)
    assert len(asked) == 1


def test_an_overflow_is_computed_in_float32(noise: Callable[..., Tensor]) -> None:
    hidden, weight, bias = noise(1, 16, 4, 4, dtype=torch.float16), noise(16), noise(16)
    with Float32Math():
        result = fused.activate_groups(hidden, weight.half(), bias.half(), 8, 1e-6)
    assert result is not None
    assert result.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_decode(base: ZImagePipeline, device: torch.device, noise: Callable[..., Tensor], dtype: torch.dtype) -> None:
    vae = copy.deepcopy(base.autoencoder.vae).to(device, dtype)
    assert isinstance(vae, AutoencoderKL)
    latents = noise(1, 16, 3, 2)
    pictures = []
    for mode in ("on", "off"):
        with using(mode):
            pictures.append(Autoencoder(vae).decode(latents).float())
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert not torch.equal(*pictures)
    torch.testing.assert_close(*pictures, rtol=0, atol=tolerance)
