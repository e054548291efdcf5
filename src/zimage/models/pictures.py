"""Convolutions of pictures, and the sums and enlargements between them, with few passes over memory.

On CUDA torch adds the bias of a channels-last convolution in a pass of its own, a slow one. Where kernels are used a
convolution is called without its bias here, which goes along beside the result to whatever reads that next: a norm
(`layers.activate`) or a sum. Sums round as torch does. Elsewhere modules are called as they stand, and so is one that
is hooked, replaced or unknown. Knows no model.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ..kernels.switch import run, usable, wanted
from .layers import is_bare

Convolved = tuple[Tensor, Tensor | None]
"""A picture (B, C, H, W) of nobody else, and the bias (C,) that is to be added to it, if one is."""


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
    """`module(hidden)` (B, C, 2H, 2W); of diffusers' plain upsampling, nearest pixels and a convolution, fused."""
    if type(module) is Upsample2D and wanted(hidden) and _doubles(module):
        larger: Tensor | None = run("pictures.double", hidden)
        if larger is not None:
            return convolve(module.conv, larger)
    result: Tensor = module(hidden)
    return result


def _doubles(module: Upsample2D) -> bool:
    """Whether `module` takes each pixel four times and calls its convolution, and nothing else."""
    return (
        module.use_conv
        and not module.use_conv_transpose
        and module.interpolate
        and module.norm is None
        and module.name == "conv"
        and is_bare(module)
    )
