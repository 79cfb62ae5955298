"""Gradual magnitude pruning (Zhu and Gupta, "To prune, or not to prune", 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsefx.algorithms.base import Algorithm, Split
from sparsefx.algorithms.layer import Layer, Run
from sparsefx.algorithms.options import expect_share, expect_steps
from sparsefx.errors import OptionError
from sparsefx.patterns import Pattern
from sparsefx.schedules import cubic


@dataclass(frozen=True)
class Gradual(Algorithm):
    """All weights participate at first; then the smallest go, along a cube: many at first, few in the end. None comes back.

    Attributes:
        prune_from: share of the run after which pruning begins.
        prune_until: share of the run at which the density asked for is reached.
        rewire_every: steps from one pruning to the next.
    """

    prune_from: float = 0.0
    prune_until: float = 0.75
    rewire_every: int = 100

    def __post_init__(self) -> None:
        for name in ("prune_from", "prune_until"):
            expect_share(name, getattr(self, name))
        expect_steps("rewire_every", self.rewire_every)
        if self.prune_from >= self.prune_until:
            raise OptionError(
                f"prune_from={self.prune_from} and prune_until={self.prune_until} were given; expected prune_from < prune_until"
            )

    @property
    def name(self) -> str:
        return "gradual"

    @property
    def summary(self) -> str:
        return "dense at first; the smallest |w| go in steps, along a cube, until the density is reached"

    def refusal(self, pattern: Pattern) -> str | None:
        if pattern.fixed_density is None:
            return None
        return (
            f"it begins dense and lowers the density step by step, but with pattern {pattern.name!r} that is always "
            f"{pattern.fixed_density:g}; use pattern 'unstructured', or algorithm 'magnitude'"
        )

    @property
    def chooses_together(self) -> bool:
        return True

    def shards_refusal(self) -> str | None:
        return None

    def first_density(self, density: float) -> float:
        return 1.0

    def after_step(self, run: Run) -> Split:
        if not self._prunes(run):
            return Split(dormant_scale=0.0)
        return Split(rewire=True, dormant_scale=0.0, densities=[self._density(run, layer) for layer in run.layers])

    def move(self, run: Run) -> None:
        if self._prunes(run):
            for layer in run.layers:
                layer.record.density = self._density(run, layer)
                layer.mask_moments()

    def _density(self, run: Run, layer: Layer) -> float:
        first, last = self._steps(run)
        target = layer.record.density if layer.record.target is None else layer.record.target
        return cubic(1.0, target, first_step=first, last_step=last)(run.step)

    def _steps(self, run: Run) -> tuple[int, int]:
        last = max(1, round(self.prune_until * run.total_steps))
        return min(round(self.prune_from * run.total_steps), last - 1), last

    def _prunes(self, run: Run) -> bool:
        first, last = self._steps(run)
        return (first < run.step < last and run.step % self.rewire_every == 0) or run.step == last


GRADUAL = Gradual()
