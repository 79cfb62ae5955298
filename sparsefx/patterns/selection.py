"""Choosing a given number of the largest scores, the same way in every pattern."""

from __future__ import annotations

import torch
from torch import Tensor


def participating(density: float, total: int) -> int:
    """How many of ``total`` weights (or blocks, or channels) a density means: rounded, and at least 1."""
    return min(max(1, round(density * total)), total)


def largest(scores: Tensor, count: int) -> Tensor:
    """Bool mask of exactly the ``count`` largest entries; of equal ones, the first in row-major order stay.

    Args:
        scores: non-negative and finite, of any shape and floating dtype.
        count: from 1 to ``scores.numel()``.

    Returns:
        bool tensor in the scores' shape and memory layout. Nothing waits for the device.
    """
    flat = scores.reshape(-1)
    if count == flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    above = flat > threshold
    equal = flat == threshold
    open_places = count - above.sum()
    chosen = above | (equal & (equal.cumsum(0) <= open_places))
    return torch.empty_like(scores, dtype=torch.bool).copy_(chosen.view(scores.shape))


def summation_dtype(scores: Tensor) -> torch.dtype:
    """The widest floating dtype of the scores' device: float64, and float32 where there is none (Apple's GPUs)."""
    return torch.float32 if scores.device.type == "mps" else torch.float64
