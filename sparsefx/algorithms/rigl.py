"""RigL (Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsefx.algorithms import scores
from sparsefx.algorithms.composed import DropAndGrow, Parts


@dataclass(frozen=True, kw_only=True)
class RigL(DropAndGrow):
    """Every 100 steps the smallest |w| of each layer are dropped, and the weights with the largest dense gradient grown.

    That takes the place of the optimizer's step: no parameter is updated in it. New weights are zero, and so are their moments.
    Dense gradients are looked at in those steps only.

    Attributes:
        drop_fraction: 0.3 at first, falling to 0 along a cosine.
        rewire_every: 100 steps.
        fix_after: masks stay after 0.75 of the run.
    """

    drop_fraction: float = 0.3
    rewire_every: int | None = 100
    fix_after: float = 0.75

    @property
    def name(self) -> str:
        return "rigl"

    @property
    def summary(self) -> str:
        return "every 100 steps the smallest |w| of each layer go, and weights with the largest dense gradient come"

    @property
    def parts(self) -> Parts:
        return Parts(drop=scores.magnitude, grow=scores.gradient, replaces_step=True)


RIGL = RigL()
