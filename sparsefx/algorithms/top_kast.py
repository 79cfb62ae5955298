"""Top-KAST (Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsefx.algorithms.base import Algorithm, Split
from sparsefx.algorithms.layer import Layer, Run
from sparsefx.algorithms.options import expect_not_negative, expect_share, expect_steps
from sparsefx.errors import OptionError
from sparsefx.ops.select import largest_among
from sparsefx.ops.split import keep_masked, penalize
from sparsefx.shards import counts_of

_BACKWARD = "backward"


@dataclass(frozen=True)
class TopKAST(Algorithm):
    """The largest |w| participate; they and the next largest are updated; the others keep the value that they have, dormant.

    Attributes:
        backward_density: d', share of each layer's weights that are updated; None stands for twice the layer's density d. It
            is at least d.
        penalty: factor of the L2 penalty on weights that participate; on those that are only updated it is divided by d, which
            makes their place hard to keep (the paper's exploration regularisation).
        rewire_every: steps from one choice of both sets to the next.
    """

    backward_density: float | None = None
    penalty: float = 1e-4
    rewire_every: int = 100

    def __post_init__(self) -> None:
        if self.backward_density is not None:
            expect_share("backward_density", self.backward_density)
        expect_not_negative("penalty", self.penalty)
        expect_steps("rewire_every", self.rewire_every)

    @property
    def name(self) -> str:
        return "top-kast"

    @property
    def summary(self) -> str:
        return "the largest |w| participate, a larger set of them is updated, and the rest keeps its values"

    @property
    def keeps_dormant(self) -> bool:
        return True

    def shards_refusal(self) -> str | None:
        return None

    def check(self, run: Run) -> None:
        for layer in run.layers:
            if self.backward_density is not None and self.backward_density < layer.record.density:
                raise OptionError(
                    f"backward_density={self.backward_density} was given, but {layer.name} has density {layer.record.density:g}; "
                    "expected at least that"
                )

    def begin(self, run: Run, layer: Layer) -> None:
        layer.state[_BACKWARD] = self._updated(layer)

    def edit_gradients(self, run: Run, layers: Sequence[Layer]) -> None:
        # Dormant values are zero where weights participate: they get what their penalty is larger by.
        penalties = [self.penalty * layer.downhill for layer in layers]
        more = [all_ / max(layer.record.density, 1e-12) - all_ for layer, all_ in zip(layers, penalties, strict=True)]
        gradients, reached = [layer.gradient for layer in layers], [layer.state[_BACKWARD] for layer in layers]
        if run.loss_scale is None:
            weights, records = [layer.weight for layer in layers], [layer.record for layer in layers]
            penalize(gradients, weights, records, reached, scale=penalties, more=more)
            return
        for layer, gradient, all_, factor in zip(layers, gradients, penalties, more, strict=True):
            gradient.add_(layer.weight * run.loss_scale, alpha=all_)
            gradient.add_(_dormant(layer) * run.loss_scale, alpha=factor)
        keep_masked(gradients, reached)

    def after_step(self, run: Run) -> Split:
        # Momentum and weight decay reach the others too, whatever their gradient was: they go back to their value.
        return Split(rewire=self._rewires(run), reached=[layer.state[_BACKWARD] for layer in run.layers])

    def move(self, run: Run) -> None:
        if self._rewires(run):
            for layer in run.layers:
                layer.state[_BACKWARD].copy_(self._updated(layer))

    def _rewires(self, run: Run) -> bool:
        return run.step % self.rewire_every == 0

    def _updated(self, layer: Layer) -> Tensor:
        """The weights that participate, and of the others the largest, up to the density d'."""
        wanted = self.backward_density if self.backward_density is not None else min(1.0, 2 * layer.record.density)
        shards = layer.record.shards
        total = layer.mask.numel() if shards is None else shards.numel
        used = counts_of([layer.mask], [shards])[0]
        more = max(0, round(wanted * total) - used)
        if more == 0:
            return layer.mask.clone()
        return layer.mask | largest_among([_dormant(layer).abs()], [~layer.mask], more, shards=[shards])[0]


def _dormant(layer: Layer) -> Tensor:
    dormant = layer.record.dormant
    assert dormant is not None
    return dormant


TOP_KAST = TopKAST()
