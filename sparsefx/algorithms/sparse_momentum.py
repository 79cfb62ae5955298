"""Sparse momentum (Dettmers and Zettlemoyer, "Sparse Networks from Scratch", 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsefx.algorithms import scores
from sparsefx.algorithms.composed import DropAndGrow, Parts, Redistribute
from sparsefx.algorithms.drop_grow import Within
from sparsefx.algorithms.options import expect_one_of
from sparsefx.errors import OptionError

Growth = Literal["momentum", "random", "neuron", "global"]
Drop = Literal["magnitude", "set", "global"]
Redistribution = Literal["momentum", "magnitude", "nonzero", "none"]


@dataclass(frozen=True, kw_only=True)
class SparseMomentum(DropAndGrow):
    """Once an epoch, drop the smallest |w| of each layer, give layers with more momentum more of them, and grow by momentum.

    Momentum stays dense: weights have one while they do not participate, and keep it.

    Attributes:
        drop_fraction: 0.5 at first, 0.005 in the end, along a cosine.
        growth: which weights are grown: those with the largest ``|momentum|`` of their layer; random ones; those with the
            largest of their neuron, neurons sharing by mean ``|momentum|``; or those with the largest of all layers together.
        drop: which weights go: the smallest of each layer; the smallest of each sign, as in SET; the smallest of all layers.
        redistribution: a layer's share of all weights that are grown: mean ``|momentum|``, mean ``|w|`` or the number of its
            participating weights; with ``none``, and with growth ``global``, there are no shares.
        depth_ramp: below 1, layers near the input change more slowly than those near the output, which the author found
            useful for transformers.
    """

    last_drop_fraction: float = 0.005
    growth: Growth = "momentum"
    drop: Drop = "magnitude"
    redistribution: Redistribution | None = None

    def __post_init__(self) -> None:
        expect_one_of("growth", self.growth, Growth)
        expect_one_of("drop", self.drop, Drop)
        if self.redistribution is not None:
            expect_one_of("redistribution", self.redistribution, Redistribution)
        if self.growth == "global" and self.redistribution not in (None, "none"):
            raise OptionError(
                f"redistribution={self.redistribution!r} was given with growth='global', which ranks all layers together "
                "and leaves no shares to divide; leave redistribution out"
            )
        super().__post_init__()

    @property
    def name(self) -> str:
        return "sparse-momentum"

    @property
    def summary(self) -> str:
        return (
            "once an epoch the smallest |w| go, and weights with the largest momentum come, more of them where momentum is large"
        )

    @property
    def parts(self) -> Parts:
        by: Redistribution = self.redistribution or ("none" if self.growth == "global" else "momentum")
        shares: dict[str, Redistribute] = {
            "momentum": scores.mean_momentum,
            "magnitude": scores.mean_magnitude,
            "nonzero": "nonzero",
            "none": None,
        }
        within: dict[str, Within] = {"neuron": "neuron", "global": "all"}
        return Parts(
            drop=scores.magnitude_by_sign if self.drop == "set" else scores.magnitude,
            grow=scores.random if self.growth == "random" else scores.momentum,
            redistribute=shares[by],
            drop_within="all" if self.drop == "global" else "layer",
            grow_within=within.get(self.growth, "layer"),
            by_sign=self.drop == "set",
            needs_momentum=self.growth != "random" or by == "momentum",
            dense_moments=True,
        )


SPARSE_MOMENTUM = SparseMomentum()
