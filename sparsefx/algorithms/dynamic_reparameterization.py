"""DSR, dynamic sparse reparameterization (Mostafa and Wang, "Parameter Efficient Training of Deep CNNs by DSR", 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsefx.algorithms import scores
from sparsefx.algorithms.allocate import allocate
from sparsefx.algorithms.base import Algorithm, First, first_scores_of
from sparsefx.algorithms.drop_grow import Places, grow_largest
from sparsefx.algorithms.layer import Layer, Run
from sparsefx.algorithms.options import expect_not_negative, expect_one_of, expect_share, expect_steps
from sparsefx.algorithms.start import Start
from sparsefx.patterns import Channel, GlobalUnstructured, Pattern
from sparsefx.shards import counts_of

_THRESHOLD = "threshold"


@dataclass(frozen=True)
class DynamicReparameterization(Algorithm):
    """Weights below one threshold for all layers are dropped; layers grow at random, in proportion to how many survived in them.

    The threshold doubles when too few were dropped, and halves when too many were.

    Attributes:
        threshold: at first.
        drop_fraction: share of all participating weights that a change of masks should drop.
        tolerance: how far the number dropped may be off, as a share of it, before the threshold changes.
        rewire_every: steps from one change to the next.
        first: which weights participate at first.
    """

    threshold: float = 1e-3
    drop_fraction: float = 0.01
    tolerance: float = 0.1
    rewire_every: int = 100
    first: First = "random"

    def __post_init__(self) -> None:
        expect_not_negative("threshold", self.threshold)
        expect_share("drop_fraction", self.drop_fraction)
        expect_share("tolerance", self.tolerance)
        expect_steps("rewire_every", self.rewire_every)
        expect_one_of("first", self.first, First)

    @property
    def name(self) -> str:
        return "dsr"

    @property
    def summary(self) -> str:
        return "weights below one adaptive threshold go, and random ones come where most have survived"

    def refusal(self, pattern: Pattern) -> str | None:
        if pattern.fixed_density is not None:
            return (
                f"it moves weights between layers, but with pattern {pattern.name!r} each layer's density is always "
                f"{pattern.fixed_density:g}; use pattern 'unstructured'"
            )
        if isinstance(pattern, Channel):
            return "it moves weights between layers, whose filters differ in size; use pattern 'unstructured'"
        if isinstance(pattern, GlobalUnstructured):
            return (
                "the pattern shares weights between layers by one ranking, and this method by its own rule; use pattern "
                "'unstructured' (densities='global' gives it the same start)"
            )
        return None

    def shards_refusal(self) -> str | None:
        return None

    def first_scores(self, start: Start) -> list[Tensor]:
        return first_scores_of(self.first, start)

    def begin(self, run: Run, layer: Layer) -> None:
        run.values.setdefault(_THRESHOLD, self.threshold)

    def in_force(self, run: Run) -> dict[str, Any]:
        return {**Algorithm.in_force(self, run), "threshold": run.values.get(_THRESHOLD, self.threshold)}

    def move(self, run: Run) -> None:
        if run.step % self.rewire_every or run.step >= run.total_steps:
            return
        threshold = run.values[_THRESHOLD]
        places = [Places(layer) for layer in run.layers if layer.trains]
        if not places:
            return
        sizes = [place.drop_scores(scores.magnitude) for place in places]
        # The largest of a layer stays whatever the threshold is, so that none dies.
        kept = [(place.active & (size >= threshold)) | place.best(size) for place, size in zip(places, sizes, strict=True)]
        left = counts_of(kept, [place.shards for place in places])
        dropped = sum(place.count for place in places) - sum(left)
        wanted = self.drop_fraction * sum(place.count for place in places)
        if dropped < (1 - self.tolerance) * wanted:
            run.values[_THRESHOLD] = threshold * 2
        elif dropped > (1 + self.tolerance) * wanted:
            run.values[_THRESHOLD] = threshold / 2
        room = [place.total - count for place, count in zip(places, left, strict=True)]
        counts = allocate(dropped, [float(count) for count in left], room)
        random = [place.scores(scores.random(place.layer)) for place in places]
        grow_largest(places, kept, random, counts, within="layer", clear_moments=True)


DSR = DynamicReparameterization()
