"""The decoder: its affine map, the range of its pixels, and that neither NaN nor infinity turns into a colour."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from zimage import NonFiniteError
from zimage.models import autoencoder
from zimage.models.autoencoder import Autoencoder, to_image

SCALING, SHIFT = 0.3611, 0.1159


class Stub:
    """A VAE whose decoder is a function of the scaled latents."""

    def __init__(self, decode: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32, **config: Any) -> None:
        self.config = SimpleNamespace(**{"scaling_factor": SCALING, "shift_factor": SHIFT, **config})
        self.dtype = dtype
        self.function = decode

    def decode(self, scaled: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert return_dict is False
        return (self.function(scaled),)


@pytest.fixture(scope="module")
def vae(base_folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(base_folder / "vae", dtype=torch.float32).eval()


@pytest.fixture
def hooked(vae: AutoencoderKL) -> Iterator[Callable[[Callable[..., Any]], None]]:
    handles: list[Any] = []
    yield lambda hook: handles.append(vae.decoder.conv_out.register_forward_hook(hook))
    for handle in handles:
        handle.remove()


@pytest.fixture
def as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """What enlarges is called as diffusers calls it; else it is one convolution, which rounds otherwise."""
    monkeypatch.setattr(autoencoder, "upsample", lambda module, hidden: module(hidden))


def latents(*, height: int = 4, width: int = 6, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def reference(vae: AutoencoderKL) -> Tensor:
    """The pixels of `latents()` by diffusers, in zimage's layout."""
    scaled = (latents() / SCALING + SHIFT).contiguous(memory_format=torch.channels_last)
    return (vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.usefixtures("as_it_stands")
def test_pixels(vae: AutoencoderKL) -> None:
    pixels = Autoencoder(vae).decode(latents())
    assert pixels.shape == (1, 3, 32, 48)
    assert torch.equal(pixels, reference(vae))
    assert not pixels.requires_grad


def test_pixels_that_are_enlarged_by_one_convolution(vae: AutoencoderKL) -> None:
    pixels, theirs = Autoencoder(vae).decode(latents()), reference(vae)
    with torch.no_grad():
        exact = copy.deepcopy(vae).double().decode(latents().double() / SCALING + SHIFT).sample / 2 + 0.5
    inside = (exact > 0) & (exact < 1)
    assert 0 < (pixels - theirs).abs().max() < 1e-5
    assert (pixels - exact)[inside].norm() < 1.2 * (theirs - exact)[inside].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_layout_of_the_weights_does_not_change_the_bits(vae: AutoencoderKL, dtype: torch.dtype) -> None:
    """Loaded by diffusers or by zimage; and the weights of a shared VAE stay as they lie."""
    plain, last = (
        copy.deepcopy(vae).to(dtype).to(memory_format=layout)
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert torch.equal(Autoencoder(plain).decode(latents()), Autoencoder(last).decode(latents()))
    assert plain.decoder.conv_in.weight.is_contiguous()


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_pixels_are_within_range(vae: AutoencoderKL, scale: float) -> None:
    pixels = Autoencoder(vae).decode(latents(scale=scale))
    assert pixels.min() >= 0
    assert pixels.max() <= 1


@pytest.mark.usefixtures("as_it_stands")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_decoder_has_the_bits_of_diffusers(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    own = copy.deepcopy(vae).to(dtype).to(memory_format=layout)
    scaled = latents().to(dtype) / SCALING + SHIFT
    given = scaled.clone()
    with torch.no_grad():
        theirs = own.decode(scaled).sample
        monkeypatch.setattr(AutoencoderKL, "decode", lambda *_, **__: pytest.fail("decoded by diffusers"))
        assert torch.equal(Autoencoder(own)._pixels(scaled), theirs)
    assert torch.equal(scaled, given)


def hook_a_block(vae: AutoencoderKL, called: Callable[[], None]) -> None:
    vae.decoder.up_blocks[1].register_forward_hook(lambda *_: called())


def hook_a_residual(vae: AutoencoderKL, called: Callable[[], None]) -> None:
    vae.decoder.mid_block.resnets[0].register_forward_pre_hook(lambda *_: called())


def hook_an_activation(vae: AutoencoderKL, called: Callable[[], None]) -> None:
    vae.decoder.up_blocks[0].resnets[1].nonlinearity.register_forward_hook(lambda *_: called())


def offload(vae: AutoencoderKL, called: Callable[[], None]) -> None:
    vae._hf_hook = SimpleNamespace(pre_forward=lambda module: called())


def replace_a_residual(vae: AutoencoderKL, called: Callable[[], None]) -> None:
    class Other(type(vae.decoder.mid_block.resnets[1])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            called()
            return super().forward(*args, **kwargs)

    vae.decoder.mid_block.resnets[1].__class__ = Other


@pytest.mark.usefixtures("as_it_stands")
@pytest.mark.parametrize("change", [hook_a_block, hook_a_residual, hook_an_activation, offload, replace_a_residual])
def test_what_is_attached_to_the_decoder_is_called(
    vae: AutoencoderKL, change: Callable[[AutoencoderKL, Callable[[], None]], None]
) -> None:
    own, calls = copy.deepcopy(vae), []
    change(own, lambda: calls.append(1))
    pixels = Autoencoder(own).decode(latents())
    assert calls
    assert torch.equal(pixels, Autoencoder(vae).decode(latents()))


def test_tiling_is_kept(vae: AutoencoderKL) -> None:
    own = copy.deepcopy(vae)
    own.enable_tiling()
    own.tile_latent_min_size, own.tile_sample_min_size = 4, 32
    assert torch.equal(Autoencoder(own).decode(latents()), reference(own))
    assert not torch.equal(Autoencoder(own).decode(latents()), Autoencoder(vae).decode(latents()))


def test_a_decoder_of_another_kind_is_left_to_diffusers() -> None:
    channels, kinds = (8, 8), ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]
    other = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=kinds, block_out_channels=channels,
        latent_channels=16, norm_num_groups=4, scaling_factor=SCALING, shift_factor=SHIFT,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    assert torch.equal(Autoencoder(other).decode(latents()), reference(other))


def test_range_and_rounding_by_hand() -> None:
    shown = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).expand(1, 3, 1, 5)
    pixels = Autoencoder(Stub(lambda scaled: shown)).decode(latents())
    assert pixels[0, 0, 0].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(("shift", "expected"), [(SHIFT, 1 / SCALING + SHIFT), (None, 1 / SCALING), (0.0, 1 / SCALING)])
def test_affine_map_by_hand(shift: float | None, expected: float) -> None:
    seen: list[Tensor] = []

    def decode(scaled: Tensor) -> Tensor:
        seen.append(scaled)
        return scaled[:, :3]

    Autoencoder(Stub(decode, shift_factor=shift)).decode(torch.ones(1, 16, 2, 2))
    assert seen[0].flatten().tolist() == pytest.approx([expected] * 64)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_an_error(
    vae: AutoencoderKL, hooked: Callable[[Callable[..., Any]], None], value: float
) -> None:
    """Infinity would be white or black after the clamp; it is looked for before."""

    def damage(module: Any, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, 1, 3, 5] = value
        return output

    hooked(damage)
    with pytest.raises(NonFiniteError, match="the image decoder gave NaN or infinity"):
        Autoencoder(vae).decode(latents())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_overflow_in_half_precision_is_decoded_again(dtype: torch.dtype) -> None:
    types: list[torch.dtype] = []

    def decode(scaled: Tensor) -> Tensor:
        image = scaled[:, :3] * 1.0
        types.append(image.dtype)
        return image * float("inf") if image.dtype == dtype else image

    given = latents(scale=0.01)
    pixels = Autoencoder(Stub(decode, dtype)).decode(given)
    assert types == [dtype, torch.float32]
    expected = ((given[:, :3] / SCALING + SHIFT) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pixels, expected, rtol=1e-2, atol=1e-2)


def test_to_image() -> None:
    pixels = torch.zeros(1, 3, 2, 3)
    pixels[0, :, 1, 2] = torch.tensor([1.0, 0.5, 0.25])
    pixels[0, :, 0, 1] = torch.tensor([0.4999 / 255, 0.5001 / 255, 254.6 / 255])
    image = to_image(pixels)
    assert image.mode == "RGB"
    assert image.size == (3, 2)
    assert np.asarray(image)[1, 2].tolist() == [255, 128, 64]
    assert np.asarray(image)[0, 1].tolist() == [0, 1, 255]
    assert to_image(pixels.half()).getpixel((2, 1)) == (255, 128, 64)


def test_every_level_survives() -> None:
    levels = torch.arange(256) / 255
    array = np.asarray(to_image(levels.expand(1, 3, 1, 256)))
    assert array[0, :, 0].tolist() == list(range(256))


def pixels() -> Tensor:
    return torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_encoder_has_the_bits_of_diffusers(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    own = copy.deepcopy(vae).to(dtype)
    wide = (pixels() * 2 - 1).to(dtype)
    with torch.no_grad():
        theirs = own.encode(wide).latent_dist.parameters
        monkeypatch.setattr(AutoencoderKL, "encode", lambda *_, **__: pytest.fail("encoded by diffusers"))
        assert torch.equal(Autoencoder(own)._moments(wide), theirs)


def test_latents_are_a_sample_of_the_encoders_distribution(vae: AutoencoderKL) -> None:
    noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        posterior = vae.encode(pixels() * 2 - 1).latent_dist
    encoded = Autoencoder(vae).encode(pixels(), noise)
    torch.testing.assert_close(encoded, (posterior.mean + posterior.std * noise - SHIFT) * SCALING)
    assert not torch.allclose(encoded, Autoencoder(vae).encode(pixels(), -noise))
    assert encoded.dtype == torch.float32
    assert not encoded.requires_grad


def test_a_hooked_encoder_encodes_as_its_own_class_does(vae: AutoencoderKL) -> None:
    own, seen = copy.deepcopy(vae), list[int]()
    plain = Autoencoder(vae).encode(pixels(), torch.zeros(1, 16, 4, 6))
    own.encoder.down_blocks[1].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(Autoencoder(own).encode(pixels(), torch.zeros(1, 16, 4, 6)), plain)
    assert seen == [1]


def test_an_encoder_that_overflows_is_computed_again_in_float32(vae: AutoencoderKL) -> None:
    own = copy.deepcopy(vae)
    with torch.no_grad():
        own.encoder.conv_in.weight.mul_(2e5 / own.encoder.conv_in.weight.abs().max() / 4)
    half = copy.deepcopy(own).to(torch.float16)
    assert half.encoder.conv_in.weight.isfinite().all()
    with torch.no_grad():
        assert not half.encode((pixels() * 2 - 1).half()).latent_dist.parameters.isfinite().all()
    encoded = Autoencoder(half).encode(pixels(), torch.zeros(1, 16, 4, 6))
    assert encoded.isfinite().all()
    with torch.no_grad():
        own.encoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the image encoder gave NaN or infinity"):
        Autoencoder(own).encode(pixels(), torch.zeros(1, 16, 4, 6))


def test_edges_on_black_are_encoded_as_exactly_as_anything(vae: AutoencoderKL) -> None:
    """Control images are flat, and a variance that is a difference of squares would be lost in them."""
    pixels = torch.zeros(1, 3, 96, 128)
    pixels[:, :, ::17] = pixels[:, :, :, 40] = 1
    exact = copy.deepcopy(vae).double().encode(pixels.double() * 2 - 1).latent_dist.mode()
    exact = (exact - vae.config.shift_factor) * vae.config.scaling_factor
    encoded = Autoencoder(vae).encode(pixels, None)
    assert (encoded - exact).abs().max() <= 1e-5 * exact.abs().max()
