"""What participates together: single weights, blocks or whole filters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsefx.patterns.base import Pattern
from sparsefx.patterns.block import Block
from sparsefx.patterns.channel import Channel
from sparsefx.patterns.global_unstructured import GlobalUnstructured
from sparsefx.patterns.unstructured import Unstructured


def is_free(pattern: Pattern) -> bool:
    """Whether any choice of units is a mask of the pattern. It is not where groups restrict it, as in N:M."""
    return isinstance(pattern, (Unstructured, GlobalUnstructured, Block, Channel))


def has_units(pattern: Pattern) -> bool:
    """Whether units are not the weights themselves, so that tensors of units have a shape of their own."""
    return isinstance(pattern, (Block, Channel))


def weights_per_unit(pattern: Pattern, shape: Sequence[int], reduction_axis: int) -> int:
    """How many weights of a layer of this shape come and go together."""
    if isinstance(pattern, Block):
        return pattern.rows * pattern.columns
    if isinstance(pattern, Channel):
        return torch.Size(shape).numel() // shape[1 - reduction_axis]
    return 1


def unit_scores(pattern: Pattern, scores: Tensor, reduction_axis: int) -> Tensor:
    """One score a unit, of non-negative scores in the weight's shape: a block's norm, a filter's sum, or the scores
    themselves."""
    if isinstance(pattern, (Block, Channel)):
        return pattern.unit_scores(scores, reduction_axis)
    return scores


def spread_units(pattern: Pattern, chosen: Tensor, like: Tensor, reduction_axis: int) -> Tensor:
    """The mask in ``like``'s shape of chosen units: bool, in the shape that `unit_scores` gives."""
    if isinstance(pattern, (Block, Channel)):
        return pattern.spread(chosen, like, reduction_axis)
    return chosen
