"""How many floating-point operations each stage asks for, counted from a model's sizes.

Matrix products and attention only, a multiplication and an addition being two. Counted is the least that gives the
picture: the caption branch once, patches once a step, the noise refiner once for captions of one padded length, and
each pixel that the decoder enlarges once, not its copies. Work that an implementation does beyond that earns it
nothing. Knows configurations, no weights and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..models.transformer import PATCH, TOKEN_MULTIPLE

MODULATION_WIDTH = 256
"""Width of the timestep embedding that modulates (`ADALN_EMBED_DIM` in diffusers), or the model's own if less."""
_FREQUENCIES, _TIME_WIDTH = 256, 1024


def padded(tokens: int) -> int:
    """`tokens` filled up to the next multiple that the transformer takes."""
    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def block_flops(config: Any, tokens: int) -> int:
    """Attention and feed-forward of one block at so many tokens."""
    dim = config.dim
    weights = 4 * dim**2 + 3 * dim * int(dim / 3 * 8)
    return 2 * tokens * weights + 4 * tokens**2 * dim


def denoising_flops(config: Any, image_tokens: int, captions: Sequence[int], steps: int) -> int:
    """`steps` of a picture; `captions` are the tokens of its prompt and, with guidance, of its negative prompt."""
    dim = config.dim
    patch = PATCH**2 * config.in_channels
    image, lengths = padded(image_tokens), [padded(tokens) for tokens in captions]
    refined = config.n_refiner_layers
    caption_branch = sum(
        2 * length * config.cap_feat_dim * dim + refined * block_flops(config, length) for length in lengths
    )
    entry = 2 * image_tokens * patch * dim + len(set(lengths)) * refined * block_flops(config, image)
    layers = sum(
        config.n_layers * block_flops(config, image + length) + 2 * image_tokens * dim * patch for length in lengths
    )
    return caption_branch + steps * (noise_level_flops(config) + entry + layers)


def noise_level_flops(config: Any) -> int:
    """What a noise level does to every block, of one step."""
    dim, width = config.dim, min(config.dim, MODULATION_WIDTH)
    times = 2 * _FREQUENCIES * _TIME_WIDTH + 2 * _TIME_WIDTH * width
    return times + (config.n_refiner_layers + config.n_layers) * 2 * width * 4 * dim + 2 * width * dim


def encoding_flops(config: Any, layers: int, tokens: int) -> int:
    """One prompt of so many tokens, unpadded, through `layers` layers of the text encoder with this configuration."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    return layers * (2 * tokens * weights + 4 * tokens**2 * queries)


def decoding_flops(config: Any, height: int, width: int) -> int:
    """The image decoder for one picture of these pixels, as torch counts a run of it without memory.

    But for the 3 x 3 convolutions of enlarged pixels: of equal neighbours the taps are one, which leaves four ninths.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    scale = 2 ** (len(config.block_out_channels) - 1)
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL.from_config(config)
        with FlopCounterMode(display=False) as counter:
            vae.decode(torch.empty(1, config.latent_channels, height // scale, width // scale))
    enlarging = config.block_out_channels[1:]  # the channels of each level that is enlarged, the finest first
    spared = sum(2 * 5 * channels**2 * height * width // 4**level for level, channels in enumerate(enlarging))
    return int(counter.get_total_flops()) - spared
