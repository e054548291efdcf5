"""Kernels beside the convolutions of pictures: sums with the biases that those left out, and weights that enlarge.

Launched as those of `fused` are, and with its rules: `None` where a kernel was not written for what is given. Imported
at the first use; importing it needs Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused, pixels

SPREAD_BLOCK = 32
"""Channels on each side of a program that spreads taps: 8 of its numbers for each thread, in each of 16 places."""


@fused._overridable
def add(
    update: Tensor, bias: Tensor | None, hidden: Tensor | None = None, hidden_bias: Tensor | None = None
) -> Tensor | None:
    """`(update + bias) + (hidden + hidden_bias)` of pictures (B, C, H, W) and biases (C,), rounded after each sum and
    written over `update`; without what is `None`."""
    if not fused._is_picture(update) or not all(fused._is_channels(one, update) for one in (bias, hidden_bias)):
        return None
    if hidden is not None and (hidden.shape != update.shape or not fused._is_picture(hidden)):
        return None
    given = [one for one in (bias, hidden, hidden_bias) if one is not None]
    if any(one.dtype != update.dtype or one.device != update.device for one in given):
        return None
    length, block = update.numel(), fused.GATE_BLOCK
    fused._launch(
        pixels.add_elements, (-(-length // block),), update, bias, hidden, hidden_bias, length,
        channels=update.shape[1], is_whole=length % block == 0, block=block, num_warps=4,
    )  # fmt: skip
    return update


@fused._overridable
def spread(weight: Tensor) -> Tensor | None:
    """What a convolution with `weight` (out, in, 3, 3) does to a picture with each pixel four times, as the weight (in,
    out, 4, 4), channels last, of a transposed convolution of the picture itself: sums of taps, rounded once.

    Output row 2i reads row i - 1 by the first tap and i by the sum of the others, row 2i + 1 reads i by the sum of the
    first two and i + 1 by the last. Stride 2 and padding 1 bring row i to rows 2i - 1 to 2i + 2 of the output.
    """
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or not weight.numel() or weight.dtype not in fused.TYPES:
        return None
    outputs, inputs = weight.shape[:2]
    if weight.is_contiguous():
        step, apart = 9, 1
    elif weight.is_contiguous(memory_format=torch.channels_last):
        step, apart = 1, inputs
    else:
        return None
    shape, block = (inputs, outputs, 4, 4), SPREAD_BLOCK
    result = torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
    fused._launch(
        pixels.spread_taps, (-(-outputs // block), -(-inputs // block)), weight, result,
        inputs=inputs, outputs=outputs, step=step, apart=apart, block=block, num_warps=4,
    )  # fmt: skip
    return result
