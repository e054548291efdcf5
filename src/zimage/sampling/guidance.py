"""Classifier-free guidance for flow models: how two predictions become one. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(positive: Tensor, negative: Tensor, scale: float, normalization: float = 0.0) -> Tensor:
    """`positive + scale·(positive − negative)` in float32, for predictions (B, C, H, W), image by image.

    Imagen's w (arXiv 2205.11487, eq. 2) less one. With `normalization` k > 0 the norm of each guided image is at most
    k times that of its positive prediction. Nothing is read back to the host.
    """
    positive, negative = positive.float(), negative.float()
    guided = positive + scale * (positive - negative)
    if normalization > 0:
        limit = _norm(positive) * normalization
        guided = guided * (limit / _norm(guided)).clamp(max=1.0).nan_to_num(nan=1.0)
    return guided


def is_guided(time: float, scale: float, truncation: float) -> bool:
    """Whether guidance acts at the model's time `1 − sigma`: it is on, and `time` has not passed `truncation`."""
    return scale > 0 and not time > truncation


def _norm(images: Tensor) -> Tensor:
    return torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)
