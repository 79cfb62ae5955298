"""Accelerated sparse training with transposable masks (Hubara et al., "Accelerated Sparse Neural Training", 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsefx.algorithms.sr_ste import SRSTE
from sparsefx.patterns import Pattern, Transposable


@dataclass(frozen=True)
class Accelerated(SRSTE):
    """N:M masks along both axes, so that forward and backward products are sparse; 4:8 as published.

    Dense updates as in SR-STE, with masks that are chosen anew now and then, since a transposable mask is costlier to find.

    Attributes:
        decay: lambda of SR-STE.
        rewire_every: steps from one choice of masks to the next.
    """

    rewire_every: int = 40

    @property
    def name(self) -> str:
        return "accelerated"

    @property
    def summary(self) -> str:
        return "transposable N:M masks, chosen anew every 40 steps; all weights are updated as in SR-STE"

    def refusal(self, pattern: Pattern) -> str | None:
        if isinstance(pattern, Transposable):
            return None
        return "it is for masks that are sparse along both axes; use pattern '4:8-transposable', or algorithm 'sr-ste'"


ACCELERATED = Accelerated()
