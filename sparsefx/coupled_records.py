"""Records whose masks are chosen together, since their channels can only be cut out together (pattern ``channel:coupled``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsefx.patterns.coupled_channel import CoupledChannel
from sparsefx.sparse_parameter import SparseParameter

PATTERN = CoupledChannel()


def by_coupling(records: Sequence[SparseParameter]) -> list[list[int]]:
    """Positions of the records of each coupling; those that have none are in no list."""
    found: dict[int, list[int]] = {}
    for position, record in enumerate(records):
        if record.coupled is not None and record.pattern == PATTERN:
            found.setdefault(id(record.coupled.coupling), []).append(position)
    return list(found.values())


def coupled_masks(weights: Sequence[Tensor], records: Sequence[SparseParameter], density: float) -> list[Tensor]:
    """The best masks for ``|weight|`` of records of one coupling."""
    members = [record.coupled for record in records if record.coupled is not None]
    return PATTERN.choose(weights, members, density, [record.reduction_axis for record in records])


@torch.no_grad()
def couple_loaded(weights: Sequence[Tensor], records: Sequence[SparseParameter]) -> None:
    """After values were loaded into all of the weights: masks of whole classes, those that were loaded where there is room for
    them."""
    for positions in by_coupling(records):
        chosen, values = [records[i] for i in positions], [weights[i] for i in positions]
        if any(value.is_meta or not bool(torch.isfinite(value).all()) for value in values):
            continue
        members = [record.coupled for record in chosen if record.coupled is not None]
        axes = [record.reduction_axis for record in chosen]
        density = chosen[0].density
        masks = PATTERN.widened([record.mask for record in chosen], members, density, axes)
        if masks is not None and all(torch.equal(mask, record.mask) for mask, record in zip(masks, chosen, strict=True)):
            continue
        dormant = [record.dormant for record in chosen]
        dense = [
            value if beside is None else torch.where(record.mask, value, beside)
            for value, beside, record in zip(values, dormant, chosen, strict=True)
        ]
        masks = coupled_masks(dense, chosen, density) if masks is None else masks
        for value, whole, record, mask in zip(values, dense, chosen, masks, strict=True):
            record.remember_mask()
            record.mask.copy_(mask)
            record.keep(whole)
            value.copy_(whole.masked_fill(~mask, 0))


__all__ = ["PATTERN", "by_coupling", "couple_loaded", "coupled_masks"]
