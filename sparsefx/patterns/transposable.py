"""N:M along both axes: the weight and its transpose can both run on Sparse Tensor Cores (2D)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.patterns.base import Pattern
from sparsefx.patterns.greedy_transposable import greedy_blocks
from sparsefx.patterns.n_of_m import check_n_of_m
from sparsefx.patterns.shapes import divisibility_refusal, weight_refusal
from sparsefx.patterns.two_of_four_blocks import best_blocks


@dataclass(frozen=True, repr=False)
class Transposable(Pattern):
    """Every row and every column of each m x m block over axes 0 and 1, at each (r, s), has exactly ``n`` weights.

    2:4 is exact: of the 90 patterns of a 4 x 4 block, the one that keeps the largest sum of ``|scores|``, summed in float64
    (`two_of_four_blocks` states how ties are decided). Other N:M are an approximation: the greedy choice of Hubara et al.
    ("Accelerated Sparse Neural Training", 2021), which keeps at least half of the largest possible sum, followed by
    exchanges that bring every row and column to exactly n (`greedy_transposable`).
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_n_of_m(self.n, self.m)

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}-transposable"

    @property
    def fixed_density(self) -> float | None:
        return self.n / self.m

    def refusal(self, shape: Sequence[int], *, reduction_axis: int = 1) -> str | None:
        return (
            weight_refusal(shape, reduction_axis)
            or divisibility_refusal(shape, reduction_axis, reduction_axis, self.m)
            or divisibility_refusal(shape, 1 - reduction_axis, reduction_axis, self.m)
        )

    def _mask(self, scores: Tensor, density: float, reduction_axis: int) -> Tensor:
        mask = torch.empty_like(scores, dtype=torch.bool)
        if self.n == self.m:
            return mask.fill_(True)
        # [m, m, blocks...]: the m * m places of a block lie in front, so that each is one dense vector over all blocks.
        blocks = _blocks(scores, self.m)
        flat = blocks.reshape(self.m, self.m, -1)
        chosen = best_blocks(flat) if (self.n, self.m) == (2, 4) else greedy_blocks(flat, self.n)
        _blocks(mask, self.m).copy_(chosen.view(blocks.shape))
        return mask


def _blocks(tensor: Tensor, m: int) -> Tensor:
    """A view ``[m, m, axis 0 / m, axis 1 / m, ...]`` of ``[axis 0, axis 1, ...]``."""
    blocks: Tensor = tensor.unflatten(1, (-1, m)).unflatten(0, (-1, m))
    return blocks.movedim((1, 3), (0, 1))
