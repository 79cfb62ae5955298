"""SparseGPT: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.errors import NonFiniteError, OptionError
from sparsefx.one_shot.base import OneShotMethod
from sparsefx.patterns import Pattern
from sparsefx.patterns.n_of_m import NOfM
from sparsefx.patterns.unstructured import Unstructured


@dataclass(frozen=True)
class SparseGPT(OneShotMethod):
    """Columns are masked from left to right, and the weights to the right of each make up for what it lost.

    The loss is the squared error of the layer's outputs on the calibration data; its Hessian, the Gram matrix of the inputs,
    is the same for all outputs, so one Cholesky factor of its inverse serves them all. Within a block of columns (for N:M
    within each group) the weights with the smallest w^2 / [H^-1]_jj^2 are masked, with both taken as they stand by then.
    Weights of an input that was always zero are masked first, as published; a layer whose inputs were all zero (an expert that no
    token reached) is masked by magnitude, and what stays of it is as it was.

    Attributes:
        damping: share of the Gram matrix's mean diagonal that is added to its diagonal.
        block: columns after which the remaining ones are brought up to date; without N:M also the range of comparison.
    """

    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1 or self.block < 16 or self.block % 16:
            raise OptionError(
                f"damping={self.damping!r} and block={self.block!r} were given; expected a share between 0 and 1, and a "
                f"multiple of 16"
            )

    @property
    def name(self) -> str:
        return "sparsegpt"

    def refusal(self, pattern: Pattern) -> str | None:
        if isinstance(pattern, (Unstructured, NOfM)):
            return None
        return "it chooses 'unstructured' masks and N:M along the reduction axis"

    def empty(self, columns: int, like: Tensor) -> Tensor:
        return torch.zeros(columns, columns, dtype=_precision(like), device=like.device)

    def add(self, statistic: Tensor, inputs: Tensor) -> None:
        inputs = inputs.to(statistic.dtype)
        statistic.addmm_(inputs.T, inputs)

    def solve(self, weight: Tensor, statistic: Tensor, pattern: Pattern, density: float) -> tuple[Tensor, Tensor]:
        if not bool(statistic.any()):
            by_magnitude = pattern.mask(weight, density)
            return weight.masked_fill(~by_magnitude, 0), by_magnitude
        work = weight.to(statistic.dtype).clone()
        factor = self._inverse_factor(statistic)
        dead = statistic.diagonal() == 0
        work[:, dead] = 0
        mask = torch.zeros_like(work, dtype=torch.bool)
        columns = work.shape[1]
        # Groups of N:M lie within blocks.
        block = max(1, self.block // pattern.m) * pattern.m if isinstance(pattern, NOfM) else self.block
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            part, chosen = work[:, start:stop], mask[:, start:stop]
            own = factor[start:stop, start:stop]
            scales = own.diagonal()
            errors = torch.zeros_like(part)
            if isinstance(pattern, Unstructured):
                chosen.copy_(pattern.mask(part / scales, density))
            for column in range(stop - start):
                if isinstance(pattern, NOfM) and column % pattern.m == 0:
                    group = slice(column, column + pattern.m)
                    chosen[:, group] = pattern.mask(part[:, group] / scales[group])
                lost = part[:, column].masked_fill(chosen[:, column], 0) / scales[column]
                part[:, column:] -= lost[:, None] * own[column, column:]
                errors[:, column] = lost
            work[:, stop:] -= errors @ factor[start:stop, stop:]
        return work.masked_fill(~mask, 0).to(weight.dtype), mask

    def _inverse_factor(self, gram: Tensor) -> Tensor:
        """The upper Cholesky factor of the damped Gram matrix's inverse."""
        diagonal = gram.diagonal().clone()
        mean = float(diagonal.mean()) or 1.0
        diagonal[diagonal == 0] = 1
        damped = gram.clone()
        share = self.damping
        while share < 10:  # a Gram matrix of few samples is singular, and rounding can make it indefinite
            damped.diagonal().copy_(diagonal + share * mean)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not int(failed):
                factor = torch.cholesky_inverse(factor)
                factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
                if not int(failed):
                    upper: Tensor = factor
                    return upper
            share *= 10
        raise NonFiniteError("the inputs' Gram matrix cannot be inverted; expected finite inputs: look at the calibration data")


def _precision(like: Tensor) -> torch.dtype:
    # Consumer GPUs compute float64 at a small fraction of their speed.
    return torch.float64 if like.device.type == "cpu" else torch.float32
