"""Whole filters participate or do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.patterns.base import Pattern
from sparsefx.patterns.selection import largest, participating, summation_dtype
from sparsefx.patterns.shapes import weight_refusal


@dataclass(frozen=True, repr=False)
class Channel(Pattern):
    """The ``round(density * channels)`` output channels with the largest sum of ``|scores|``, at least one.

    Sums are taken in float64. A Linear loses whole rows, a Conv whole filters (Li et al., "Pruning Filters for Efficient
    ConvNets", 2017, ranks filters by the same sum).
    """

    @property
    def name(self) -> str:
        return "channel"

    @property
    def fixed_density(self) -> float | None:
        return None

    def refusal(self, shape: Sequence[int], *, reduction_axis: int = 1) -> str | None:
        return weight_refusal(shape, reduction_axis)

    def _mask(self, scores: Tensor, density: float, reduction_axis: int) -> Tensor:
        output_axis = 1 - reduction_axis
        others = [axis for axis in range(scores.dim()) if axis != output_axis]
        sums = scores.sum(dim=others, keepdim=True, dtype=summation_dtype(scores))
        chosen = largest(sums, participating(density, scores.shape[output_axis]))
        return torch.empty_like(scores, dtype=torch.bool).copy_(chosen.expand(scores.shape))
