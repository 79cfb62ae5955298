"""Sparse checkpoints whose layers have other densities than the model: methods that move weights between layers leave such."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsefx.algorithms.allocate import allocate, none_empty
from sparsefx.ops.select_shards import Ranking, largest_of_shards
from sparsefx.patterns import Block, Unstructured
from sparsefx.patterns.selection import largest, participating
from sparsefx.patterns.units import spread_units, unit_scores, weights_per_unit
from sparsefx.shards import counts_of
from sparsefx.sparse_parameter import SparseParameter


@torch.no_grad()
def keep_whole(records: Sequence[tuple[Tensor, SparseParameter]]) -> None:
    """Keep every non-zero that was loaded, where the layers together have room for it though one of them has not.

    The layers' densities become those of the checkpoint, and the number of weights that participate in all of them stays what it
    was. A checkpoint with more non-zeros than that is left as it was cut layer by layer.

    Args:
        records: detached weights that hold participating values, with their records, after a state_dict was loaded.
    """
    pool = [(w, r) for w, r in records if isinstance(r.pattern, (Unstructured, Block)) and not w.is_meta]
    if all(record.left_out is None for _, record in pool):
        return
    sizes = {weights_per_unit(record.pattern, weight.shape, record.reduction_axis) for weight, record in pool}
    if len(sizes) > 1:
        return
    size = sizes.pop()
    values = [w if r.left_out is None else torch.where(r.mask, w, r.left_out) for w, r in pool]
    used = [_units(value != 0, record) for value, (_, record) in zip(values, pool, strict=True)]
    shards = [record.shards for _, record in pool]
    numbers = [w.numel() if one is None else one.numel for (w, _), one in zip(pool, shards, strict=True)]
    totals = [number // size for number in numbers]
    needed = counts_of([units > 0 for units in used], shards)
    budget = sum(participating(record.density, total) for (_, record), total in zip(pool, totals, strict=True))
    if sum(needed) > budget:
        return
    room = [total - count for total, count in zip(totals, needed, strict=True)]
    spare = allocate(budget - sum(needed), [float(count) for count in needed], room)
    kept = none_empty([count + more for count, more in zip(needed, spare, strict=True)])
    for (weight, record), value, units, total, count in zip(pool, values, used, totals, kept, strict=True):
        # Places that take part with the value zero are not in a checkpoint: those of the present mask come first.
        preferred = (units > 0) * 2.0 + (_units(record.mask, record) > 0)
        if record.shards is None:
            chosen = largest(preferred, count)
        else:
            chosen = largest_of_shards([Ranking([preferred], [record.shards], count)])[0][0]
        record.remember_mask()
        record.mask.copy_(spread_units(record.pattern, chosen, record.mask, record.reduction_axis))
        record.density = count / total
        record.threshold = None
        record.keep(torch.zeros_like(weight))
        weight.copy_(value.masked_fill(~record.mask, 0))


def _units(chosen: Tensor, record: SparseParameter) -> Tensor:
    return unit_scores(record.pattern, chosen.to(torch.float32), record.reduction_axis)
