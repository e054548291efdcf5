"""Convolutions of pictures, and the sums and enlargements between them, with few passes over memory.

On CUDA torch adds the bias of a channels-last convolution in a pass of its own, a slow one. Where kernels are used a
convolution is called without its bias here, which goes along beside the result to whatever reads that next: a norm
(`layers.activate`) or a sum. Sums round as torch does. A convolution of a picture whose pixels were written four times
each reads the picture itself there, with four ninths of the products, and so it does in float32 on a CPU. Elsewhere
modules are called as they stand, and so is one that is hooked, replaced or unknown. Knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ..kernels.switch import run, usable, wanted
from .layers import is_bare

Convolved = tuple[Tensor, Tensor | None]
"""A picture (B, C, H, W) of nobody else, and the bias (C,) that is to be added to it, if one is."""
HALF = (torch.bfloat16, torch.float16)
MOST_NUMBERS = 2**31
"""Of a picture that is made twice the size by one convolution: what 32 bits count."""


def convolved(module: Any, hidden: Tensor) -> Convolved:
    """`module(hidden)`; of a plain convolution without its bias, where a kernel can add that."""
    is_plain = wanted(hidden) and type(module) is nn.Conv2d and is_bare(module)
    if is_plain and usable(hidden, module.weight, module.bias):
        return module._conv_forward(hidden, module.weight, None), module.bias
    return module(hidden), None


def convolve(module: Any, hidden: Tensor) -> Tensor:
    """`module(hidden)`; the bias of a plain convolution is added by a kernel where there is one."""
    values, bias = convolved(module, hidden)
    return values if bias is None else add(values, bias)


def add(update: Tensor, bias: Tensor | None, hidden: Tensor | None = None, hidden_bias: Tensor | None = None) -> Tensor:
    """`(update + bias) + (hidden + hidden_bias)` without what is `None`, rounded after each sum and written over
    `update`; `hidden` may be written over too if it has a bias."""
    if wanted(update):
        fused: Tensor | None = run("pictures.add", update, bias, hidden, hidden_bias)
        if fused is not None:
            return fused
    if bias is not None:
        update = update.add_(bias[:, None, None])
    if hidden is None:
        return update
    return update.add_(hidden if hidden_bias is None else hidden.add_(hidden_bias[:, None, None]))


def upsample(module: Any, hidden: Tensor) -> Tensor:
    """`module(hidden)` (B, C, 2H, 2W); of diffusers' plain upsampling, nearest pixels and a convolution of 3 x 3, one
    transposed convolution: in half precision where kernels are used, in float32 on a CPU. A card can take longer over
    that in float32, and a CPU that emulates half precision does."""
    if type(module) is Upsample2D and _doubles(module) and _fits(module.conv, hidden):
        weight, bias = module.conv.weight, module.conv.bias
        if hidden.dtype in HALF and wanted(hidden) and usable(hidden, weight, bias):
            spread: Tensor | None = run("pictures.spread", weight)
            if spread is not None:
                values = _enlarged(hidden, spread)
                return values if bias is None else add(values, bias)
        elif hidden.dtype == torch.float32 and hidden.device.type == "cpu":
            return F.conv_transpose2d(hidden, _spread(weight), bias, stride=2, padding=1)
    result: Tensor = module(hidden)
    return result


def _spread(weight: Tensor) -> Tensor:
    """As the kernel `spread`: of the weight (out, in, 3, 3) that of a transposed convolution, (in, out, 4, 4)."""
    for axis in (2, 3):
        first, middle, last = weight.unbind(axis)
        weight = torch.stack((last, middle + last, first + middle, first), axis)
    return weight.transpose(0, 1)


def _enlarged(hidden: Tensor, weight: Tensor) -> Tensor:
    """The transposed convolution of stride 2 and padding 1 with `weight` (in, out, 4, 4).

    As `conv_transpose2d` but always deterministic, which on CUDA that is only by a switch of the whole process: of
    cuDNN's ways to compute it some sum in any order.
    """
    stride, one, none, cudnn = (2, 2), (1, 1), (0, 0), torch.backends.cudnn
    allow_tf32 = True  # half precision has none, but without it some versions leave out tensor cores
    return torch._convolution(
        hidden, weight, None, stride, one, one, True, none, 1, cudnn.benchmark, True, cudnn.enabled, allow_tf32
    )


def _doubles(module: Upsample2D) -> bool:
    """Whether `module` takes each pixel four times and calls a plain convolution of 3 x 3, and nothing else."""
    return (
        module.use_conv
        and not module.use_conv_transpose
        and module.interpolate
        and module.norm is None
        and module.name == "conv"
        and is_bare(module)
        and _is_plain(module.conv)
    )


def _is_plain(conv: Any) -> bool:
    """Whether `conv` convolves 3 x 3 pixels, zeros beyond the edge, to one pixel each, and nothing else."""
    if type(conv) is not nn.Conv2d or not is_bare(conv) or conv.padding_mode != "zeros" or conv.groups != 1:
        return False
    return conv.kernel_size == (3, 3) and conv.stride == conv.padding == conv.dilation == (1, 1)


def _fits(conv: nn.Conv2d, hidden: Tensor) -> bool:
    """Whether `hidden` goes with the weight and is not too large once it is enlarged."""
    weight, (batch, _, height, width) = conv.weight, hidden.shape
    if weight.dtype != hidden.dtype or weight.device != hidden.device:
        return False
    return 4 * batch * max(weight.shape[:2]) * height * width < MOST_NUMBERS
