"""How large a model is and what its stages need beside their weights: counts of parameters, and formulas of peaks.

The formulas count the tensors that are alive at once where the code needs the most; tests hold them against the code
itself. Plain arithmetic, no torch. Knows nothing of budgets or placement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number in each precision that a pipeline runs in."""

NF4_BLOCK = 64
"""Weights of NF4 that share a scale."""
STORED_BYTES = {"bfloat16": 2.0, "int8": 1.0, "float8": 1.0, "nf4": 0.5 + 4 / NF4_BLOCK}
"""Bytes of a weight that is stored otherwise than it is computed with, scales included; those of whole rows are a
thousandth."""

GGML_BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip
"""Numbers and bytes of a block of each kind that GGUF files store weights as, by ggml's names."""
FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""Kinds of 8-bit floats that safetensors files store weights as, by their names."""

TOKEN_MULTIPLE = 32
TOGETHER = 4096
"""Tokens of image and caption, of both branches of guidance, up to which these are computed together: as many as the
image of 1024 x 1024 pixels has, so that they need no more memory than one branch does there."""
TOKEN_SIDE = 16
"""Pixels per side of an image token: 8 of the autoencoder times a patch of 2."""
LATENT_SIDE = 8
STRIP, STRIP_CHANNELS = 128, 32
"""Rows that a decode in strips keeps of each, and channels that its norms have in float32 at a time."""
SCHEDULE_STEPS = 50
"""Steps whose modulations are counted: the longest recipe's."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Numbers of parameters, and the widths that decide what a stage needs beside them.

    `text_layers` and `blocks` count the parameters of each layer that can be moved on its own, in the order in which
    they run: `blocks` are the noise refiners and the main layers without their modulations, which are needed for all
    steps at once and count among `transformer_rest`; `context_blocks` run once per prompt.

    What a file has in fewer bits and keeps so is not among them: `packed_text`, `packed_blocks` and `packed_context`
    are its bytes in each of them, empty where there is nothing of it.
    """

    text_layers: tuple[int, ...]
    text_rest: int
    """The embedding of tokens."""
    blocks: tuple[int, ...]
    context_blocks: tuple[int, ...]
    transformer_rest: int
    vae: int
    text_width: int
    text_intermediate: int
    dim: int
    vae_channels: tuple[int, ...]
    """Channels of the decoder's levels, the finest first."""
    vae_residuals: int
    """Residual blocks of each level."""
    native_side: int = 1024
    """Pixels per side of the pictures that it was trained on."""
    packed_blocks: tuple[int, ...] = ()
    packed_context: tuple[int, ...] = ()
    packed_text: tuple[int, ...] = ()
    in_bfloat16: bool = False
    """Whether the files have all matrices of the layers in bfloat16 or fewer bits, so that nothing is lost by it."""
    adapters: int = 0
    """Bytes of the adapters and the ControlNet that are loaded, which stay on the device whatever passes through; those
    of both where two models were planned together."""
    control_blocks: int = 0
    """Blocks of the ControlNet that is loaded."""

    @property
    def packed(self) -> int:
        """Bytes of text encoder and transformer that files have in fewer bits."""
        return sum(self.packed_text) + sum(self.packed_blocks) + sum(self.packed_context)

    @property
    def text_encoder(self) -> int:
        return self.text_rest + sum(self.text_layers)

    @property
    def transformer(self) -> int:
        return self.transformer_rest + sum(self.blocks) + sum(self.context_blocks)


RELEASED = ModelSizes(
    text_layers=(100_930_816,) * 35,
    text_rest=388_956_160,
    blocks=(176_962_816,) * 32,
    context_blocks=(176_962_816,) * 2,
    transformer_rest=138_172_992,
    vae=83_819_683,
    text_width=2560,
    text_intermediate=9728,
    dim=3840,
    vae_channels=(128, 256, 512, 512),
    vae_residuals=3,
    in_bfloat16=True,
)
"""Both released models: the text encoder without its last layer, which nobody reads."""


class Demands(NamedTuple):
    """What a plan needs to know of a picture: pixels, tokens of its prompt, whether pixels are encoded, and how many
    tokens both branches of guidance have together at most, as `together` has it where nothing is known of it."""

    height: int
    width: int
    tokens: int
    from_image: bool = False
    together: int | None = None


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a plan is for: the `Demands` of a picture, by default of one of the released models' size, and precision."""

    height: int = 1024
    width: int = 1024
    tokens: int = 512
    dtype: str = "bfloat16"
    from_image: bool = False
    together: int | None = None

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]


def text_activations(sizes: ModelSizes, work: Work) -> int:
    """Bytes beside the weights while a prompt is encoded: in a feed-forward, gate, product and their factors."""
    return work.tokens * work.itemsize * (4 * sizes.text_width + 3 * sizes.text_intermediate)


def denoise_activations(sizes: ModelSizes, work: Work) -> int:
    """Bytes beside the weights in a denoising step, and what is kept for all steps of a schedule.

    The peak is the rotation of queries and keys: both in float32 before and after it, and in the compute type queries,
    keys, values, their concatenation, the result, the residual stream and what attention reads; the refined image is
    kept for the other branch of guidance. With a ControlNet its own tokens wait meanwhile. Where both branches are
    computed together, which a picture that a ControlNet steers does not, it is all tokens of both.
    """
    image = _filled((work.height // TOKEN_SIDE) * (work.width // TOKEN_SIDE))
    caption = _filled(work.tokens)
    both = together(work.height, work.width, work.tokens) if work.together is None else work.together
    narrow = work.dtype != "float32"
    wide = 16 if narrow else 8  # queries and keys in float32, before and after; before it is a copy only if narrow
    stream = 4 if work.dtype == "float16" else work.itemsize
    per_channel = wide + (8 if narrow else 6) * work.itemsize + 2 * stream
    kept = (SCHEDULE_STEPS * 4 * (len(sizes.blocks) + 1) + caption) * sizes.dim * work.itemsize
    latents = 8 * 16 * 4 * (work.height // LATENT_SIDE) * (work.width // LATENT_SIDE)
    beside = 0
    if sizes.control_blocks:  # its image, that after its refiner, what its layers begin with, and two streams
        beside = (5 * image + 2 * caption) * sizes.dim * stream
        kept += SCHEDULE_STEPS * 4 * sizes.control_blocks * sizes.dim * work.itemsize
    step = max((image + caption) * sizes.dim * per_channel + beside, both * sizes.dim * per_channel)
    return step + kept + latents


def together(height: int, width: int, tokens: int) -> int:
    """The most tokens that both branches of guidance of a picture have together, with prompts of up to so many tokens;
    0 if they always are more than `TOGETHER`, and so computed one after the other."""
    image = _filled((height // TOKEN_SIDE) * (width // TOKEN_SIDE))
    least = 2 * (image + TOKEN_MULTIPLE)
    return 0 if least > TOGETHER else min(TOGETHER, 2 * (image + _filled(tokens)))


def widened_weight(sizes: ModelSizes, work: Work) -> tuple[int, int]:
    """Bytes of the widest weight of a text layer and of a block in the compute type, which a product with it needs."""
    hidden = sizes.dim * 8 // 3
    return sizes.text_width * sizes.text_intermediate * work.itemsize, sizes.dim * hidden * work.itemsize


def decode_activations(sizes: ModelSizes, work: Work, strip_levels: int = 0) -> int:
    """Bytes beside the weights while a picture is decoded, its last `strip_levels` resolutions in strips.

    The peak of a level is its first residual: the input, which has the channels of the level before, and three tensors
    of its own; in strips it may be a norm, with some channels in float32.
    """
    pixels, channels = work.height * work.width, (*sizes.vae_channels, sizes.vae_channels[-1])
    before, own = channels[strip_levels + 1], channels[strip_levels]
    whole = (before + 3 * own) * pixels // 4**strip_levels * work.itemsize
    if not strip_levels:
        return whole
    rows = min(work.height, STRIP + 2 * 2**strip_levels * overlap(sizes.vae_residuals, strip_levels))
    wide = (4 if work.dtype == "float32" else 8) * min(STRIP_CHANNELS, channels[0])  # a copy only if it is narrow
    convolution = (channels[1] + 3 * channels[0]) * work.itemsize
    norm = (channels[1] + 2 * channels[0]) * work.itemsize + wide
    strip = max(convolution, norm) * rows * work.width
    source = (own * pixels // 4**strip_levels + 3 * pixels) * work.itemsize
    return max(whole, source + strip)


def encode_activations(sizes: ModelSizes, work: Work, strip_levels: int = 0) -> int:
    """Bytes beside the weights while an image is encoded, its first `strip_levels` resolutions in strips.

    The peak of a level is its second residual: the input and two tensors of its own, all with the level's channels; in
    strips a quarter of one besides, or in a norm some channels in float32. And the image itself is there, in float32
    and as the encoder reads it.
    """
    pixels, own = work.height * work.width, sizes.vae_channels[strip_levels]
    image = 3 * (4 + work.itemsize) * pixels
    whole = 3 * own * pixels // 4**strip_levels * work.itemsize
    if not strip_levels:
        return image + whole
    first = sizes.vae_channels[0]
    rows = min(work.height, STRIP + 2 * 2**strip_levels * overlap(sizes.vae_residuals - 1, strip_levels))
    wide = (4 if work.dtype == "float32" else 8) * min(STRIP_CHANNELS, first)
    strip = max(13 * first * work.itemsize // 4, 3 * first * work.itemsize + wide) * rows * work.width
    result = sizes.vae_channels[strip_levels - 1] * pixels // 4**strip_levels * work.itemsize
    return image + max(whole, result + strip)


def overlap(residuals: int, levels: int) -> int:
    """Rows of the coarsest whole level by which strips of the `levels` after it must overlap: how far the convolutions
    reach, that of each upsampler, two of each residual and the last."""
    reach = sum((1 + 2 * residuals) / 2**level for level in range(1, levels + 1))
    return math.ceil(reach + 1 / 2**levels)


def _filled(tokens: int) -> int:
    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
