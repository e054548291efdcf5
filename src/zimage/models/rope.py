"""Rotary position embedding over three axes (caption or image index, row, column). Pure functions; no state.

RoFormer, arXiv 2104.09864; the split into axes and theta 256 are Z-Image's (diffusers, transformer_z_image.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


def axis_rotations(positions: Tensor, size: int, theta: float) -> Tensor:
    """Rotations (positions, size / 2), complex64 on the CPU, of integer `positions` along an axis of `size` channels.

    Angles are formed in float64, as in the reference: float32 would lose 1e-5 at position 1500.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size))
    angles = torch.outer(positions.double(), frequencies).float()
    return torch.polar(torch.ones_like(angles), angles)


def rotate(heads: Tensor, rotations: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels of `heads` (B, N, heads, head_dim) by `rotations` (1 or B, N, half).

    For a compiler, which fuses no complex arithmetic, they may be pairs of real numbers already, (1 or B, N, half, 2).
    """
    if torch.compiler.is_compiling():
        even, odd = heads.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, heads, head_dim / 2) each
        real = torch.view_as_real(rotations) if rotations.is_complex() else rotations
        cosine, sine = real.unsqueeze(2).unbind(-1)
        turned = torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1)
        return turned.flatten(3).type_as(heads)
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))  # (B, N, heads, head_dim / 2)
    return torch.view_as_real(pairs * rotations.unsqueeze(2)).flatten(3).type_as(heads)
