"""Choosing a given number of the largest scores among candidates, in one tensor or in several together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsefx.ops import native
from sparsefx.ops.select_shards import Ranking, largest_of_shards
from sparsefx.ops.split import rewire_masks
from sparsefx.patterns.global_unstructured import GlobalUnstructured
from sparsefx.patterns.selection import largest, summation_dtype
from sparsefx.patterns.unstructured import Unstructured
from sparsefx.shards import Shards
from sparsefx.sparse_parameter import SparseParameter

_RANKED = (torch.float32, torch.float64)
_PIECE = 1 << 14


@torch.no_grad()
def largest_among(
    scores: Sequence[Tensor],
    candidates: Sequence[Tensor],
    count: int,
    *,
    shards: Sequence[Shards | None] = (),
    compiled: bool = True,
    overwrite: bool = False,
) -> list[Tensor]:
    """Exactly ``count`` largest scores of all tensors together, among the candidates only.

    Of equal scores, those of the earlier tensor are taken, and within one the first in row-major order.

    Args:
        scores: non-negative, of any shapes. NaN has no meaning; infinity counts as the largest finite number.
        candidates: bool, in these shapes.
        count: from 0 to the number of candidates.
        shards: how each tensor is cut among processes, which all call this together and together have that many candidates; empty
            where none is.
        compiled: False leaves everything to plain torch, with the same result.
        overwrite: True lets the scores' memory be used, so that they have no meaning afterwards.

    Returns:
        One bool tensor a tensor of scores, in its shape and on its device.
    """
    shared = [one for one in shards if one is not None]
    if shared:
        among = [score.masked_fill(~candidate, -1) for score, candidate in zip(scores, candidates, strict=True)]
        return largest_of_shards([Ranking(among, shared, count)])[0]
    if count == 0:
        return [torch.zeros_like(candidate) for candidate in candidates]
    if compiled and native.available() and all(_fits(score) for score in scores) and len({score.dtype for score in scores}) == 1:
        return _compiled(scores, candidates, count, overwrite)
    device, dtype = scores[0].device, summation_dtype(scores[0])
    flat = torch.cat(
        [
            score.clamp_max(torch.finfo(score.dtype).max).masked_fill(~candidate, -1).reshape(-1).to(device, dtype)
            for score, candidate in zip(scores, candidates, strict=True)
        ]
    )
    pieces = largest(flat, count).split([score.numel() for score in scores])
    return [piece.view(score.shape).to(score.device) for piece, score in zip(pieces, scores, strict=True)]


def _fits(score: Tensor) -> bool:
    return score.device.type == "cpu" and score.dtype in _RANKED and score.is_contiguous()


def _compiled(scores: Sequence[Tensor], candidates: Sequence[Tensor], count: int, overwrite: bool) -> list[Tensor]:
    """The mask kernels choose among the candidates' scores alone, which take less memory than all."""
    among = [picked(score, candidate, overwrite=overwrite) for score, candidate in zip(scores, candidates, strict=True)]
    some = [values for values in among if len(values)]
    for values in some:
        values.clamp_(0, torch.finfo(values.dtype).max)
    pattern = Unstructured() if len(some) == 1 else GlobalUnstructured()
    density = count / sum(len(values) for values in some)
    records = [SparseParameter(pattern, density, 1, torch.empty_like(values, dtype=torch.bool)) for values in some]
    rewire_masks(some, records)
    del among, some
    chosen = [torch.zeros(candidate.shape, dtype=torch.bool) for candidate in candidates]
    places = [(place, candidate) for place, candidate in zip(chosen, candidates, strict=True) if bool(candidate.any())]
    for (place, candidate), record in zip(places, records, strict=True):
        place.masked_scatter_(candidate, record.mask)
    return chosen


def picked(values: Tensor, places: Tensor, *, overwrite: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """``values[places]``, on the CPU without a temporary of the values' size.

    Args:
        values: any shape.
        places: bool, in this shape.
        overwrite: True lets the result stand in the values' own memory.
        dtype: of the result, where that is a new tensor.
    """
    if values.device.type != "cpu" or not values.is_contiguous():
        return values.masked_select(places).to(dtype or values.dtype)
    flat, which = values.reshape(-1), places.reshape(-1)
    # What is written in place never reaches what is still to be read.
    found = flat if overwrite else torch.empty(int(which.count_nonzero()), dtype=dtype or values.dtype)
    position = 0
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE].masked_select(which[start : start + _PIECE])
        found[position : position + len(piece)] = piece
        position += len(piece)
    return found[:position]


def random_among(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Exactly ``count`` of the candidates, chosen at random without replacement; bool, in their shape.

    Drawn on the CPU, whatever the device: the same seed gives the same choice everywhere.
    """
    places = candidates.reshape(-1).nonzero().squeeze(1)
    if 4 * count > len(places):
        ranks = torch.randperm(len(places), generator=generator)[:count]
    else:
        ranks = torch.empty(0, dtype=torch.int64)
        while len(ranks) < count:
            more = torch.randint(0, len(places), (count - len(ranks),), generator=generator)
            ranks = torch.cat([ranks, more]).unique()
    chosen = torch.zeros(candidates.numel(), dtype=torch.bool, device=candidates.device)
    chosen[places[ranks.to(places.device)]] = True
    return chosen.view(candidates.shape)
