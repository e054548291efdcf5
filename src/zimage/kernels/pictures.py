"""Kernels between the convolutions of pictures: sums with the biases that convolutions left out, twice the size.

Launched as those of `fused` are, and with its rules: `None` where a kernel was not written for what is given. Imported
at the first use; importing it needs Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused, pixels

MOST_PIXELS = 2**31
"""Pixels are counted in 32 bits, in which division is fast."""


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
def double(hidden: Tensor) -> Tensor | None:
    """`hidden` (B, C, H, W) with each pixel four times: (B, C, 2H, 2W)."""
    if not fused._is_picture(hidden):
        return None
    batch, channels, height, width = hidden.shape
    count, columns = batch * height * width, fused._power_of_two(channels)
    if columns > fused.TILE or 4 * count >= MOST_PIXELS:
        return None
    shape, rows = (batch, channels, 2 * height, 2 * width), fused.TILE // columns
    result = torch.empty(shape, dtype=hidden.dtype, device=hidden.device, memory_format=torch.channels_last)
    fused._launch(
        pixels.double_pixels, (-(-count // rows),), hidden, result, count, width,
        channels=channels, columns=columns, rows=rows, num_warps=8,
    )  # fmt: skip
    return result
