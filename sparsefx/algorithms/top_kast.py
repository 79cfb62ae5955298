"""Top-KAST (Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.algorithms.base import Algorithm, Split
from sparsefx.algorithms.layer import Layer, Run
from sparsefx.algorithms.options import expect_not_negative, expect_share, expect_steps
from sparsefx.errors import OptionError
from sparsefx.patterns.selection import largest

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

    def check(self, run: Run) -> None:
        for layer in run.layers:
            if self.backward_density is not None and self.backward_density < layer.record.density:
                raise OptionError(
                    f"backward_density={self.backward_density} was given, but {layer.name} has density {layer.record.density:g}; "
                    "expected at least that"
                )

    def begin(self, run: Run, layer: Layer) -> None:
        layer.state[_BACKWARD] = self._updated(layer)

    def edit_gradient(self, run: Run, layer: Layer) -> None:
        factor = torch.where(layer.mask, self.penalty, self.penalty / max(layer.record.density, 1e-12)).to(layer.weight.dtype)
        gradient = layer.gradient
        gradient.addcmul_(layer.weight, factor if run.loss_scale is None else factor * run.loss_scale)
        gradient.masked_fill_(~layer.state[_BACKWARD], 0)

    def after_step(self, run: Run) -> Split:
        for layer in run.layers:
            # Momentum and weight decay reach these too, whatever their gradient was.
            dormant = layer.record.dormant
            assert dormant is not None
            layer.weight.copy_(torch.where(layer.state[_BACKWARD], layer.weight, dormant))
        return Split(rewire=self._rewires(run))

    def move(self, run: Run) -> None:
        if self._rewires(run):
            for layer in run.layers:
                layer.state[_BACKWARD].copy_(self._updated(layer))

    def _rewires(self, run: Run) -> bool:
        return run.step % self.rewire_every == 0

    def _updated(self, layer: Layer) -> Tensor:
        """The weights that participate, and of the others the largest, up to the density d'."""
        wanted = self.backward_density if self.backward_density is not None else min(1.0, 2 * layer.record.density)
        dormant = layer.record.dormant
        assert dormant is not None
        total, used = layer.mask.numel(), int(layer.mask.sum())
        more = max(0, round(wanted * total) - used)
        if more == 0:
            return layer.mask.clone()
        return layer.mask | largest(dormant.abs().masked_fill(layer.mask, -1), more)


TOP_KAST = TopKAST()
