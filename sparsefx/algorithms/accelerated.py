"""Accelerated sparse training with transposable masks (Hubara et al., "Accelerated Sparse Neural Training", 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsefx.algorithms.base import Algorithm, Split
from sparsefx.algorithms.layer import Layer, Run
from sparsefx.algorithms.options import expect_not_negative, expect_steps
from sparsefx.algorithms.sr_ste import decay_dormant
from sparsefx.patterns import Pattern, Transposable


@dataclass(frozen=True)
class Accelerated(Algorithm):
    """N:M masks along both axes, so that forward and backward products are sparse; 4:8 as published.

    Dense updates as in SR-STE, with masks that are chosen anew now and then, since a transposable mask is costlier to find.

    Attributes:
        decay: lambda of SR-STE.
        rewire_every: steps from one choice of masks to the next.
    """

    decay: float = 2e-4
    rewire_every: int = 40

    def __post_init__(self) -> None:
        expect_not_negative("decay", self.decay)
        expect_steps("rewire_every", self.rewire_every)

    @property
    def name(self) -> str:
        return "accelerated"

    @property
    def summary(self) -> str:
        return "transposable N:M masks, chosen anew every 40 steps; all weights are updated as in SR-STE"

    @property
    def keeps_dormant(self) -> bool:
        return True

    def refusal(self, pattern: Pattern) -> str | None:
        if isinstance(pattern, Transposable):
            return None
        return "it is for masks that are sparse along both axes; use pattern '4:8-transposable', or algorithm 'sr-ste'"

    def shards_refusal(self) -> str | None:
        return None

    def edit_gradients(self, run: Run, layers: Sequence[Layer]) -> None:
        for layer in layers:
            decay_dormant(run, layer, self.decay)

    def after_step(self, run: Run) -> Split:
        return Split(rewire=run.step % self.rewire_every == 0)


ACCELERATED = Accelerated()
