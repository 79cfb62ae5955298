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

    def unit_scores(self, scores: Tensor, reduction_axis: int) -> Tensor:
        """One score a channel: the weight's axes, all of size 1 but the output axis, for non-negative scores."""
        others = [axis for axis in range(scores.dim()) if axis != 1 - reduction_axis]
        return scores.sum(dim=others, keepdim=True, dtype=summation_dtype(scores))

    def spread(self, chosen: Tensor, like: Tensor, reduction_axis: int) -> Tensor:
        """The bool mask in ``like``'s shape of chosen channels, in the shape that `unit_scores` gives."""
        return torch.empty_like(like, dtype=torch.bool).copy_(chosen.expand(like.shape))

    def _mask(self, scores: Tensor, density: float, reduction_axis: int) -> Tensor:
        units = self.unit_scores(scores, reduction_axis)
        return self.spread(largest(units, participating(density, units.numel())), scores, reduction_axis)
