"""Dropping units of weights that participate and growing as many others, so that their number never changes.

A unit is what comes and goes together in a pattern: a weight, a block, a filter. In patterns with groups (N:M) weights are
dropped, and the places that they leave are filled inside the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsefx.algorithms.allocate import allocate
from sparsefx.algorithms.layer import Layer
from sparsefx.ops.select import largest_among
from sparsefx.patterns import GlobalUnstructured, NOfM, Transposable
from sparsefx.patterns.selection import summation_dtype
from sparsefx.patterns.units import has_units, is_free, spread_units, unit_scores, weights_per_unit
from sparsefx.shards import Shards, counts_of, gather

Score = Callable[[Layer], Tensor]
Share = Callable[[Layer], float]
Within = Literal["layer", "neuron", "all"]

# Weights that stay score this much more than any that could be grown: more than a whole 16 x 16 block of those together.
_KEPT = 1024.0
_AT_A_TIME = 1 << 16  # weights


@dataclass(eq=False)
class Places:
    """The units of one layer: which participate, and how many of them."""

    layer: Layer

    def __post_init__(self) -> None:
        layer = self.layer
        self.free = is_free(layer.pattern)
        shards = self.shards
        shape = layer.mask.shape if shards is None else shards.shape
        size = weights_per_unit(layer.pattern, shape, layer.record.reduction_axis)
        self.active = self.scores(layer.mask.to(torch.float32)) > 0 if has_units(layer.pattern) else layer.mask
        self.total = shape.numel() // size
        self.count = counts_of([self.active], [shards])[0]

    @property
    def shards(self) -> Shards | None:
        """How the layer is cut among processes; all counts are of all of them together."""
        return self.layer.record.shards

    def scores(self, values: Tensor) -> Tensor:
        """One score a unit, of values of any sign in the weight's shape, which may be overwritten."""
        wide = values.detach().abs_().to(torch.promote_types(values.dtype, torch.float32))
        return unit_scores(self.layer.pattern, wide, self.layer.record.reduction_axis)

    def drop_scores(self, drop: Score) -> Tensor:
        """What `drop` says of units, by their participating weights."""
        values = drop(self.layer)
        if self.active is not self.layer.mask:  # what does not participate must not count in the score of a block
            values.masked_fill_(~self.layer.mask, 0)
        return self.scores(values)

    def dropped(self, fraction: float) -> int:
        """How many units go when that fraction of them is dropped: never all."""
        return min(round(fraction * self.count), max(0, self.count - 1))

    def best(self, scores: Tensor) -> Tensor:
        """The one unit with the largest score of those that participate."""
        return largest_among([scores], [self.active], min(1, self.count), shards=[self.shards])[0]

    def put(self, kept: Tensor, grown: Tensor, *, clear_moments: bool) -> None:
        """Let the units kept and grown participate."""
        layer = self.layer
        chosen = kept | grown
        mask = spread_units(layer.pattern, chosen, layer.mask, layer.record.reduction_axis)
        density = None
        if not isinstance(layer.pattern, GlobalUnstructured):
            density = counts_of([chosen], [self.shards])[0] / self.total
        layer.set_mask(mask, density=density, clear_moments=clear_moments)

    def filled(self, kept: Tensor, scores: Tensor) -> Tensor:
        """The mask of a pattern with groups in which the weights kept participate and the best beside them."""
        layer, axis = self.layer, self.layer.record.reduction_axis
        wide = summation_dtype(scores)
        top = (scores.amax() if scores.numel() else scores.new_zeros(())).to(wide)
        if self.shards is not None:
            top = gather(top, self.shards).amax()
        mask = torch.empty_like(layer.mask)
        if not scores.numel():
            return mask
        top.clamp_min_(torch.finfo(wide).tiny)
        height = self._rows_apart(scores)
        for start in range(0, len(scores), height):
            rows = slice(start, start + height)
            ranked = torch.where(kept[rows], _KEPT, torch.nan_to_num(scores[rows].to(wide) / top))
            mask[rows] = layer.pattern.mask(ranked, layer.record.density, reduction_axis=axis)
        return mask

    def _rows_apart(self, scores: Tensor) -> int:
        """How many rows can be filled at a time: no group lies across the borders, and temporaries stay small."""
        pattern, rows = self.layer.pattern, len(scores)
        if not isinstance(pattern, (NOfM, Transposable)) or scores.device.type != "cpu" or rows % pattern.m:
            return rows
        return pattern.m * max(1, _AT_A_TIME * rows // (scores.numel() * pattern.m))


def drop_smallest(
    places: Sequence[Places], scores: Sequence[Tensor], fractions: Sequence[float], *, together: bool
) -> list[Tensor]:
    """The units that stay when a fraction of each layer's is dropped; with ``together``, the smallest of all layers.

    Scores are overwritten. The best unit of each layer stays whatever the fraction is.
    """
    dropped = [place.dropped(fraction) for place, fraction in zip(places, fractions, strict=True)]
    if together:
        best = [place.best(score) for place, score in zip(places, scores, strict=True)]
        raised = [score.masked_fill(top, float("inf")) for score, top in zip(scores, best, strict=True)]
        count = sum(place.count for place in places) - sum(dropped)
        among, shards = [place.active for place in places], [place.shards for place in places]
        return largest_among(raised, among, count, shards=shards, overwrite=True)
    kept: list[Tensor] = []
    for place, score, count in zip(places, scores, dropped, strict=True):
        kept += largest_among([score], [place.active], place.count - count, shards=[place.shards], overwrite=True)
    return kept


def grow_largest(
    places: Sequence[Places],
    kept: Sequence[Tensor],
    scores: list[Tensor],
    counts: Sequence[int],
    *,
    within: Within,
    clear_moments: bool,
) -> None:
    """Let the units with the largest scores participate beside those kept, and move the masks.

    Args:
        places: the units of each layer.
        kept: which of them stay.
        scores: by unit, not negative. Units that were dropped just now may come back. The list is empty afterwards, so that
            masks move when their memory is free.
        counts: how many each layer grows; patterns with groups fill their groups instead.
        within: ``layer``, ``neuron`` (each output takes its share of the layer's count, by the mean of its scores), or ``all``:
            the best of all layers together.
        clear_moments: see `Layer.set_mask`.
    """
    grown: list[Tensor | None] = []
    if within == "all":
        shards = [place.shards for place in places]
        grown += largest_among(scores, [~stays for stays in kept], sum(counts), shards=shards, overwrite=True)
    else:
        for place, score, stays, count in zip(places, scores, kept, counts, strict=True):
            if not place.free:
                grown.append(None)
            elif within == "neuron":
                grown.append(_by_neuron(score, ~stays, count, place.layer.record.reduction_axis))
            else:
                grown += largest_among([score], [~stays], count, shards=[place.shards], overwrite=True)
            del score  # a loop's name would keep it
    grouped = [score for score, new in zip(scores, grown, strict=True) if new is None]
    scores.clear()
    for place, stays, new in zip(places, kept, grown, strict=True):
        if new is None:
            mask = place.filled(stays, grouped.pop(0))
            place.layer.set_mask(mask, clear_moments=clear_moments)
        else:
            place.put(stays, new, clear_moments=clear_moments)


def _by_neuron(scores: Tensor, candidates: Tensor, count: int, reduction_axis: int) -> Tensor:
    if reduction_axis == 2:  # of a stack [n, out, in], each matrix has its own outputs
        return _by_neuron(scores.flatten(0, 1), candidates.flatten(0, 1), count, 1).view(candidates.shape)
    axis = 1 - reduction_axis
    values, free = scores.movedim(axis, 0).flatten(1), candidates.movedim(axis, 0).flatten(1)
    taken = torch.tensor(allocate(count, values.mean(1).tolist(), free.sum(1).tolist()), device=values.device)
    order = values.masked_fill(~free, -1).argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(free)
    chosen.scatter_(1, order, torch.arange(values.shape[1], device=values.device) < taken.unsqueeze(1))
    return chosen.view(candidates.movedim(axis, 0).shape).movedim(0, axis)
