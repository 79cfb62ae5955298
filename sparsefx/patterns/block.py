"""Whole blocks of weights participate or do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.errors import PatternError
from sparsefx.patterns.base import Pattern
from sparsefx.patterns.selection import largest, participating, summation_dtype
from sparsefx.patterns.shapes import divisibility_refusal, weight_refusal


@dataclass(frozen=True, repr=False)
class Block(Pattern):
    """Blocks of ``rows`` along the output axis by ``columns`` along the reduction axis, at each (r, s) of a convolution.

    Exactly ``round(density * blocks)`` blocks of a layer participate, at least one: those with the largest norm of their
    scores. The norm is the largest magnitude by default ("Advances in Sparse Neural Model Training", section on block
    sparsity), or the p-norm for a finite ``p``.
    """

    rows: int
    columns: int
    p: float = float("inf")

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise PatternError(
                f"a block of {self.rows}x{self.columns} was given; expected sides of at least 1, as in 'block:1x8'"
            )
        if not self.p >= 1:
            raise PatternError(f"a norm of {self.p} was given for blocks; expected at least 1, or leave it out for the largest")

    @property
    def name(self) -> str:
        return f"block:{self.rows}x{self.columns}" + ("" if self.p == float("inf") else f":norm={self.p:g}")

    @property
    def fixed_density(self) -> float | None:
        return None

    def refusal(self, shape: Sequence[int], *, reduction_axis: int = 1) -> str | None:
        return (
            weight_refusal(shape, reduction_axis)
            or divisibility_refusal(shape, 1 - reduction_axis, reduction_axis, self.rows)
            or divisibility_refusal(shape, reduction_axis, reduction_axis, self.columns)
        )

    def unit_scores(self, scores: Tensor, reduction_axis: int) -> Tensor:
        """One score a block: ``[axis 0 / side, 1, axis 1 / side, 1, ...]`` for non-negative scores."""
        return self._norm(self._blocks(scores, reduction_axis))

    def spread(self, chosen: Tensor, like: Tensor, reduction_axis: int) -> Tensor:
        """The bool mask in ``like``'s shape of chosen blocks, in the shape that `unit_scores` gives."""
        mask = torch.empty_like(like, dtype=torch.bool)
        blocks = self._blocks(mask, reduction_axis)
        blocks.copy_(chosen.expand(blocks.shape))
        return mask

    def _mask(self, scores: Tensor, density: float, reduction_axis: int) -> Tensor:
        units = self.unit_scores(scores, reduction_axis)
        return self.spread(largest(units, participating(density, units.numel())), scores, reduction_axis)

    def _blocks(self, tensor: Tensor, reduction_axis: int) -> Tensor:
        """A view ``[axis 0 / side, side, axis 1 / side, side, ...]``."""
        rows, columns = (self.rows, self.columns) if reduction_axis == 1 else (self.columns, self.rows)
        blocks: Tensor = tensor.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return blocks

    def _norm(self, blocks: Tensor) -> Tensor:
        top = blocks.amax(dim=(1, 3), keepdim=True)
        if self.p == float("inf"):
            return top
        # Scaled by the block's largest entry, so that powers neither overflow nor vanish.
        wide = top.to(summation_dtype(blocks))
        scale = torch.where(wide > 0, wide, 1)
        return wide * ((blocks / scale) ** self.p).sum(dim=(1, 3), keepdim=True) ** (1 / self.p)
