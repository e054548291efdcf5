"""Latents to pixels and back, one image at a time, with the weights of diffusers' AutoencoderKL; knows no prompts.

The modules of decoder and encoder are called in diffusers' order. What lies between them is done in place, with the
same bits: a decode touches half the memory, which is most of its time where convolutions are cheap. What enlarges a
picture rounds otherwise where it is one convolution (see `pictures`).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, DiagonalGaussianDistribution, Encoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from PIL import Image
from torch import Tensor
from torch.nn import SiLU

from ..kernels.switch import used
from .layers import activate, is_bare
from .pictures import add, convolved, upsample
from .pixel_attention import attend
from .precision import finite
from .strips import decode_in_strips, encode_in_strips


class Autoencoder:
    """Owns the VAE and the affine map between its latents and the transformer's."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @torch.no_grad()
    def decode(self, latents: Tensor, strip_levels: int = 0) -> Tensor:
        """Latents (1, 16, h, w) of one image to pixels (1, 3, 8h, 8w) in [0, 1], in the VAE's type.

        The last `strip_levels` of the decoder's resolutions, 1 or 2, are computed in strips, with less memory and more
        time (see `strips`); 0 is none. Where the VAE is not a plain one it decodes as its own class does.

        `z / scaling_factor + shift_factor` as in the checkpoint's config (Flux's VAE: 0.3611 and 0.1159). Raises
        `NonFiniteError` if the pixels are not finite in float32 either.
        """
        config, plain = self.vae.config, _is_plain(self.vae)
        scaled = latents.to(_dtype(self.vae, plain)) / config.scaling_factor + (config.shift_factor or 0.0)
        # Convolutions keep their input's layout; on a CPU this one is 1.2 times as fast, in bfloat16 up to 2.6 times.
        scaled = scaled.contiguous(memory_format=torch.channels_last)
        pixels = finite(lambda: self._pixels(scaled, strip_levels, plain), "the image decoder")
        return (pixels * 0.5).add_(0.5).clamp_(0, 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None, strip_levels: int = 0) -> Tensor:
        """Pixels (1, 3, 8h, 8w) of one image in [0, 1] to latents (1, 16, h, w), in float32.

        As in diffusers' pipelines a sample of the encoder's distribution, `mean + deviation · noise`, or without
        `noise` its mean, and of it `(z - shift_factor) · scaling_factor`. The first `strip_levels` of the encoder's
        resolutions are computed in strips. Raises `NonFiniteError` if it is not finite in float32 either.
        """
        config, plain = self.vae.config, _is_plain_encoder(self.vae)
        # On a CPU torch's own group norm loses what is flat beside channels that lie last: of edges on black a
        # thousandth of the latents.
        by_torch = pixels.device.type == "cpu" and not used(pixels.device)
        layout = torch.contiguous_format if by_torch else torch.channels_last
        wide = (pixels * 2.0 - 1.0).to(_dtype(self.vae, plain)).contiguous(memory_format=layout)
        moments = finite(lambda: self._moments(wide, strip_levels, plain), "the image encoder")
        posterior = DiagonalGaussianDistribution(moments.float())
        sampled = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        latents: Tensor = (sampled - (config.shift_factor or 0.0)) * config.scaling_factor
        return latents.contiguous()

    def _moments(self, wide: Tensor, strip_levels: int = 0, plain: bool | None = None) -> Tensor:
        """The encoder's output (1, 32, h, w): mean and logarithm of the variance; `plain` where that is known."""
        if _is_plain_encoder(self.vae) if plain is None else plain:
            return _encoder(self.vae.encoder, wide, strip_levels)
        moments: Tensor = self.vae.encode(wide, return_dict=False)[0].parameters
        return moments

    def _pixels(self, scaled: Tensor, strip_levels: int = 0, plain: bool | None = None) -> Tensor:
        """The decoder's output (1, 3, 8h, 8w), around [-1, 1]; `plain` where that is known."""
        if _is_plain(self.vae) if plain is None else plain:
            return _decoder(self.vae.decoder, scaled, strip_levels)
        return self.vae.decode(scaled, return_dict=False)[0]


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels (1, 3, H, W) in [0, 1] as an 8-bit RGB image."""
    array = pixels[0].permute(1, 2, 0).float().mul(255).round().to(torch.uint8).cpu().numpy()  # (H, W, 3)
    return Image.fromarray(array)


def _dtype(vae: Any, plain: bool) -> torch.dtype:
    """What `vae` computes in: of a plain one that of its weights, for which diffusers looks through all its modules."""
    dtype: torch.dtype = next(vae.parameters()).dtype if plain else vae.dtype
    return dtype


def _is_plain(vae: Any) -> bool:
    """Whether `vae` decodes as `_decoder` does: untiled, of the blocks known here, nothing hooked."""
    if not _is_bare_class(vae) or vae.post_quant_conv is not None:
        return False
    return type(vae.decoder) is Decoder and _is_made_of(vae.decoder, vae.decoder.up_blocks, UpDecoderBlock2D)


def _is_plain_encoder(vae: Any) -> bool:
    """Whether `vae` encodes as `_encoder` does."""
    if not _is_bare_class(vae) or vae.quant_conv is not None:
        return False
    return type(vae.encoder) is Encoder and _is_made_of(vae.encoder, vae.encoder.down_blocks, DownEncoderBlock2D)


def _is_bare_class(vae: Any) -> bool:
    return type(vae) is AutoencoderKL and not vae.use_tiling and not hasattr(vae, "_hf_hook")


def _is_made_of(half: Any, levels: Any, kind: type) -> bool:
    """Whether all blocks of an encoder or a decoder are known here, its levels of one `kind`, and nothing is hooked."""
    return (
        type(half.mid_block) is UNetMidBlock2D
        and all(type(block) is kind for block in levels)
        and all(_is_plain_residual(residual) for block in (half.mid_block, *levels) for residual in block.resnets)
        and _is_bare_throughout(half)
    )


def _is_bare_throughout(half: Any) -> bool:
    """Whether no module of it is hooked; every decode asks, and `modules()` takes twice the time."""
    waiting = [half]
    while waiting:
        module = waiting.pop()
        if not is_bare(module):
            return False
        waiting.extend(child for child in module._modules.values() if child is not None)
    return True


def _is_plain_residual(block: Any) -> bool:
    return (
        type(block) is ResnetBlock2D
        and type(block.nonlinearity) is SiLU
        and block.time_emb_proj is None
        and block.time_embedding_norm in ("default", "group")
        and block.output_scale_factor == 1
        and not block.training
    )


def _decoder(decoder: Any, scaled: Tensor, strip_levels: int) -> Tensor:
    hidden = _middle(decoder.mid_block, decoder.conv_in(scaled), strip_levels)
    blocks = list(decoder.up_blocks)
    for number, block in enumerate(blocks, start=1):
        for residual in block.resnets:
            hidden = _residual(residual, hidden)
        if strip_levels and number == len(blocks) - strip_levels:
            return decode_in_strips(decoder, hidden, strip_levels)
        for upsampler in block.upsamplers or ():
            hidden = upsample(upsampler, hidden)  # (1, C, 2H, 2W)
    return decoder.conv_out(activate(decoder.conv_norm_out, hidden))


def _encoder(encoder: Any, wide: Tensor, strip_levels: int) -> Tensor:
    hidden = encode_in_strips(encoder, wide, strip_levels) if strip_levels else encoder.conv_in(wide)
    for block in encoder.down_blocks[strip_levels:]:
        for residual in block.resnets:
            hidden = _residual(residual, hidden)
        for downsampler in block.downsamplers or ():
            hidden = downsampler(hidden)  # (1, C, H/2, W/2)
    hidden = _middle(encoder.mid_block, hidden, strip_levels)
    return encoder.conv_out(activate(encoder.conv_norm_out, hidden))


def _middle(block: Any, hidden: Tensor, strip_levels: int) -> Tensor:
    """With strips, where memory is scarce, attention keeps no scores of many rows at once."""
    hidden = _residual(block.resnets[0], hidden)
    for attention, residual in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            hidden = attention(hidden, temb=None) if strip_levels else attend(attention, hidden)
        hidden = _residual(residual, hidden)
    return hidden


def _residual(block: Any, hidden: Tensor) -> Tensor:
    """But for `hidden` no tensor outlives the next that is made of it: each has the memory of a whole picture."""
    update, bias = convolved(block.conv1, activate(block.norm1, hidden))
    update = activate(block.norm2, update, bias)
    update, bias = convolved(block.conv2, update)
    if block.conv_shortcut is not None:
        return add(update, bias, *convolved(block.conv_shortcut, hidden))
    return add(update, bias, hidden)
