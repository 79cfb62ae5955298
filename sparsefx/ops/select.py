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

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@torch.no_grad()
def largest_among(
    scores: Sequence[Tensor],
    candidates: Sequence[Tensor],
    count: int,
    *,
    shards: Sequence[Shards | None] = (),
    compiled: bool = True,
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
        return _compiled(scores, candidates, count)
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
    return score.device.type == "cpu" and score.dtype in _BITS and score.is_contiguous()


def _compiled(scores: Sequence[Tensor], candidates: Sequence[Tensor], count: int) -> list[Tensor]:
    """The mask kernels compare magnitudes as bits: the next larger bits keep their order, and leave 0 to all that is no
    candidate."""
    shifted = [
        score.clamp(0, torch.finfo(score.dtype).max)
        .view(_BITS[score.dtype])
        .add_(1)
        .masked_fill_(~candidate, 0)
        .view(score.dtype)
        for score, candidate in zip(scores, candidates, strict=True)
    ]
    density = count / sum(score.numel() for score in scores)
    pattern = Unstructured() if len(scores) == 1 else GlobalUnstructured()
    records = [SparseParameter(pattern, density, 1, torch.empty_like(score, dtype=torch.bool)) for score in shifted]
    rewire_masks(shifted, records)
    return [record.mask for record in records]


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
