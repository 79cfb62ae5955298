"""DropBack (Golub, Lemieux and Lis, "Full Deep Neural Network Training On A Pruned Weight Budget", 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsefx.algorithms.base import Algorithm, First, Split, first_scores_of
from sparsefx.algorithms.layer import Layer, Run
from sparsefx.algorithms.options import expect_one_of, expect_share
from sparsefx.algorithms.start import Start
from sparsefx.ops.split import rewire_masks

_ORIGIN = "origin"


@dataclass(frozen=True)
class DropBack(Algorithm):
    """The weights that have moved farthest from where they began participate; all others go back to where they began.

    That is zero here for all weights outside the first mask, and for those that leave it. In the paper they go back to their
    random initial values, which no sparse weight could hold; the authors' later work (Yang et al., "Procrustes", 2020) lets those
    decay to zero, and this is where that ends.

    Attributes:
        fix_after: share of the run after which the masks stay.
        first: which weights participate in the first step. The others have moved as far after it, so that few of these stay.
    """

    fix_after: float = 1.0
    first: First = "magnitude"

    def __post_init__(self) -> None:
        expect_share("fix_after", self.fix_after)
        expect_one_of("first", self.first, First)

    @property
    def name(self) -> str:
        return "dropback"

    @property
    def summary(self) -> str:
        return "the weights that have moved farthest from where they began participate; the others go back to zero at every step"

    @property
    def keeps_moments(self) -> bool:
        return True

    @property
    def edits_gradients(self) -> bool:
        return False

    def first_scores(self, start: Start) -> list[Tensor]:
        return first_scores_of(self.first, start)

    def begin(self, run: Run, layer: Layer) -> None:
        layer.state[_ORIGIN] = layer.weight.clone()

    def after_step(self, run: Run) -> Split:
        if run.step < self.fix_after * run.total_steps or self.fix_after == 1.0:
            distances = [layer.weight - layer.state[_ORIGIN] for layer in run.layers]
            rewire_masks(distances, [layer.record for layer in run.layers])
            for layer in run.layers:
                layer.state[_ORIGIN].masked_fill_(~layer.mask, 0)
        return Split()


DROP_BACK = DropBack()
