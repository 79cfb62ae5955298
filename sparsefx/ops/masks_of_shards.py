"""The best masks of parameters that processes share: the same that one process would choose for the whole parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsefx.ops.select_shards import Ranking, largest_of_shards
from sparsefx.patterns.selection import participating
from sparsefx.patterns.units import is_free, spread_units, unit_scores, weights_per_unit
from sparsefx.sparse_parameter import SparseParameter

Members = tuple[Sequence[SparseParameter], Sequence[Tensor], float]


@torch.no_grad()
def choose_of_shards(rankings: Sequence[Members]) -> None:
    """Let masks become the best ones, in place. All processes have to call this together.

    Args:
        rankings: records that share one threshold (mostly one alone), this process's scores of them, of which only magnitudes
            count, and their density.
    """
    shared: list[tuple[Members, Ranking]] = []
    for members in rankings:
        records, scores, density = members
        if not is_free(records[0].pattern):
            for record, score in zip(records, scores, strict=True):
                if score.numel():
                    record.mask.copy_(record.pattern._mask(score.abs(), density, record.reduction_axis))
            continue
        shards = [record.shards for record in records if record.shards is not None]
        units = [
            unit_scores(record.pattern, score.abs(), record.reduction_axis) for record, score in zip(records, scores, strict=True)
        ]
        total = sum(
            one.numel // weights_per_unit(record.pattern, one.shape, record.reduction_axis)
            for one, record in zip(shards, records, strict=True)
        )
        shared.append((members, Ranking(units, shards, participating(density, total))))
    chosen = largest_of_shards([ranking for _, ranking in shared])
    for ((records, _, _), _), masks in zip(shared, chosen, strict=True):
        for record, mask in zip(records, masks, strict=True):
            record.mask.copy_(spread_units(record.pattern, mask, record.mask, record.reduction_axis))
            record.threshold = None
