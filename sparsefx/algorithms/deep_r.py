"""DEEP R (Bellec et al., "Deep Rewiring: Training very sparse deep networks", 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.algorithms.base import Algorithm, First, Split, first_scores_of
from sparsefx.algorithms.drop_grow import Places
from sparsefx.algorithms.layer import Layer, Run
from sparsefx.algorithms.options import expect_not_negative, expect_one_of
from sparsefx.algorithms.start import Start
from sparsefx.ops.select import random_among
from sparsefx.patterns import Block, Channel, GlobalUnstructured, Pattern
from sparsefx.patterns.units import is_free

_SIGN = "sign"


@dataclass(frozen=True)
class DeepR(Algorithm):
    """Each weight has a sign and walks at random beside its gradient; one that crosses zero is dropped, another grown at random.

    After the optimizer's step each participating weight moves by ``learning_rate * (noise * normal - penalty * sign)``, as in the
    authors' code; in the paper the noise is ``sqrt(2 * learning_rate * temperature)``. Weights begin at zero, with a random sign,
    in the layer that the dropped ones were in (with ``unstructured:global`` anywhere).

    Attributes:
        penalty: of the L1 norm.
        noise: standard deviation of the walk, in units of the gradient.
        first: which weights participate at first.
    """

    penalty: float = 1e-5
    noise: float = 1e-5
    first: First = "random"

    def __post_init__(self) -> None:
        expect_not_negative("penalty", self.penalty)
        expect_not_negative("noise", self.noise)
        expect_one_of("first", self.first, First)

    @property
    def name(self) -> str:
        return "deep-r"

    @property
    def summary(self) -> str:
        return "weights have a sign; one that crosses zero goes, and another comes at random"

    def refusal(self, pattern: Pattern) -> str | None:
        if isinstance(pattern, (Block, Channel)):
            return (
                f"it drops weights one by one where they change sign, and in pattern {pattern.name!r} they come and go together"
            )
        return None

    def first_scores(self, start: Start) -> list[Tensor]:
        return first_scores_of(self.first, start)

    def begin(self, run: Run, layer: Layer) -> None:
        layer.state[_SIGN] = torch.where(layer.weight < 0, -1, 1).to(torch.int8)

    def after_step(self, run: Run) -> Split:
        layers = [layer for layer in run.layers if layer.trains]
        kept = [self._walk(run, layer) for layer in layers]
        if layers and all(isinstance(layer.pattern, GlobalUnstructured) for layer in layers):
            self._replace(layers, kept)
        else:
            for layer, stays in zip(layers, kept, strict=True):
                self._replace([layer], [stays])
        return Split()

    def _walk(self, run: Run, layer: Layer) -> Tensor:
        """Move the weights that participate; which of them have kept their sign."""
        weight, sign, rate = layer.weight, layer.state[_SIGN], layer.learning_rate
        values = weight[layer.mask]
        noise = torch.randn(values.shape, generator=run.generator).to(values)
        weight[layer.mask] = values + rate * (self.noise * noise - self.penalty * sign[layer.mask].to(values.dtype))
        # What is no number stays, and is found when the step ends.
        return layer.mask & ~(weight * sign < 0)

    def _replace(self, layers: list[Layer], kept: list[Tensor]) -> None:
        dropped = sum(int(layer.mask.sum()) - int(stays.sum()) for layer, stays in zip(layers, kept, strict=True))
        if not dropped:
            return
        for layer, stays in zip(layers, kept, strict=True):
            layer.weight.masked_fill_(~stays, 0)
        if is_free(layers[0].pattern):
            together = torch.cat([~stays.reshape(-1) for stays in kept])
            pieces = random_among(together, dropped, layers[0].run.generator).split([stays.numel() for stays in kept])
            for layer, stays, piece in zip(layers, kept, pieces, strict=True):
                layer.set_mask(stays | piece.view(stays.shape))
        else:
            for layer, stays in zip(layers, kept, strict=True):
                layer.set_mask(Places(layer).filled(stays, layer.random()))
        for layer, stays in zip(layers, kept, strict=True):
            grown = layer.mask & ~stays
            signs = torch.randint(0, 2, (int(grown.sum()),), generator=layer.run.generator) * 2 - 1
            layer.state[_SIGN][grown] = signs.to(layer.mask.device, torch.int8)


DEEP_R = DeepR()
