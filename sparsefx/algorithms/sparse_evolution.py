"""SET, sparse evolutionary training (Mocanu et al., "Scalable training of artificial neural networks...", 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsefx.algorithms import scores
from sparsefx.algorithms.composed import DropAndGrow, Parts
from sparsefx.algorithms.options import expect_one_of

Drop = Literal["magnitude", "set"]


@dataclass(frozen=True, kw_only=True)
class SparseEvolution(DropAndGrow):
    """Once an epoch the smallest |w| of each layer are dropped and as many weights grown at random, from zero.

    Attributes:
        drop_fraction: 0.3 at first (the paper's zeta), falling to 0 along a cosine, as in Evci et al. 2020.
        drop: ``magnitude``, or ``set``: as large a share of the positive as of the negative weights, as first published.
    """

    drop_fraction: float = 0.3
    drop: Drop = "magnitude"

    def __post_init__(self) -> None:
        expect_one_of("drop", self.drop, Drop)
        super().__post_init__()

    @property
    def name(self) -> str:
        return "set"

    @property
    def summary(self) -> str:
        return "once an epoch the smallest |w| of each layer go, and as many random weights come"

    @property
    def parts(self) -> Parts:
        by_sign = self.drop == "set"
        return Parts(drop=scores.magnitude_by_sign if by_sign else scores.magnitude, grow=scores.random, by_sign=by_sign)


SET = SparseEvolution()
