"""SR-STE: dense updates with a decay of dormant values inside the gradient (Zhou et al., "Learning N:M Fine-grained...",
2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsefx.algorithms.base import Algorithm, Split
from sparsefx.algorithms.layer import Layer, Run
from sparsefx.algorithms.options import expect_not_negative, expect_steps


@dataclass(frozen=True)
class SRSTE(Algorithm):
    """The largest |w| participate; all weights are updated, those that do not participate with ``gradient + decay * w``.

    Attributes:
        decay: the paper's lambda.
        rewire_every: steps from one choice of masks to the next.
    """

    decay: float = 2e-4
    rewire_every: int = 1

    def __post_init__(self) -> None:
        expect_not_negative("decay", self.decay)
        expect_steps("rewire_every", self.rewire_every)

    @property
    def name(self) -> str:
        return "sr-ste"

    @property
    def summary(self) -> str:
        return "the largest |w| participate; all weights are updated, and the gradient makes the others smaller"

    @property
    def keeps_dormant(self) -> bool:
        return True

    @property
    def chooses_together(self) -> bool:
        return True

    def shards_refusal(self) -> str | None:
        return None

    def edit_gradients(self, run: Run, layers: Sequence[Layer]) -> None:
        for layer in layers:
            decay_dormant(run, layer, self.decay)

    def after_step(self, run: Run) -> Split:
        return Split(rewire=run.step % self.rewire_every == 0)


def decay_dormant(run: Run, layer: Layer, decay: float) -> None:
    """Add ``decay * w`` to the gradient of weights that do not participate, in place."""
    record, scale = layer.record, run.loss_scale
    # Inside a step the weight holds them.
    dormant = layer.weight.masked_fill(record.mask, 0) if record.merged and record.compact is not None else record.dormant
    if dormant is not None:
        layer.gradient.add_(dormant if scale is None else dormant * scale, alpha=decay * layer.downhill)


SR_STE = SRSTE()
