"""Choosing a given number of the largest scores of tensors that processes share, exactly, without sending the scores.

The threshold is found digit by digit: non-negative floats order as the integers with their bits, and for each group of bits all
processes add up a histogram of those scores that agree with the digits found so far. What equals the threshold is taken in
row-major order of the whole tensor. So the choice is the one that a single process makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from sparsefx.shards import Shards, add_up, by_group, gather

_DIGIT = 11  # bits: 2048 bins a ranking, in 3 rounds for float32 and 6 for float64


@dataclass(frozen=True, eq=False)
class Ranking:
    """Tensors among whose elements the ``count`` largest are to be chosen together.

    Attributes:
        scores: of this process, non-negative; a negative score is never chosen. Infinity counts as the largest finite number.
        shards: one a tensor, all of the same processes.
        count: at most the number of scores that can be chosen, over all processes.
    """

    scores: Sequence[Tensor]
    shards: Sequence[Shards]
    count: int


@torch.no_grad()
def largest_of_shards(rankings: Sequence[Ranking]) -> list[list[Tensor]]:
    """For each ranking one bool tensor a tensor of scores. All processes have to call this together.

    Of equal scores, those of the earlier tensor are taken, and within one the first in row-major order of the whole tensor.
    """
    chosen: list[list[Tensor]] = [[] for _ in rankings]
    for positions in by_group([ranking.shards[0] for ranking in rankings]).values():
        group = [rankings[position] for position in positions]
        for position, found in zip(positions, _of_one_group(group), strict=True):
            chosen[position] = found
    return chosen


def _of_one_group(rankings: Sequence[Ranking]) -> list[list[Tensor]]:
    first = rankings[0].shards[0]
    dtype = reduce(torch.promote_types, (score.dtype for ranking in rankings for score in ranking.scores), torch.float32)
    keys = [torch.cat([_key(score, dtype).reshape(-1) for score in ranking.scores]) for ranking in rankings]
    left = torch.tensor([ranking.count for ranking in rankings], device=keys[0].device)
    thresholds, left = _thresholds(keys, left, 31 if dtype is torch.float32 else 63, first)
    equal = [_rows(key == threshold, ranking) for key, threshold, ranking in zip(keys, thresholds, rankings, strict=True)]
    # Per row of what comes before the axis that is cut: how many each process has, and with that how many come before its own.
    everywhere = gather(torch.cat([row.sum(1) for rows in equal for row in rows]), first)
    mine = first.ranks.index(torch.distributed.get_rank())
    result: list[list[Tensor]] = []
    position = 0
    for key, threshold, rows, ranking, room in zip(keys, thresholds, equal, rankings, left, strict=True):
        ahead = everywhere[position : position + sum(len(row) for row in rows)]
        position += len(ahead)
        before = (ahead.reshape(-1).cumsum(0) - ahead.reshape(-1)).view(ahead.shape)[:, mine]
        above = (key > threshold).split([score.numel() for score in ranking.scores])
        masks: list[Tensor] = []
        for score, row, larger, offset in zip(ranking.scores, rows, above, before.split([len(row) for row in rows]), strict=True):
            taken = row & (row.cumsum(1) + offset.unsqueeze(1) <= room)
            masks.append(larger.view(score.shape) | taken.view(score.shape))
        result.append(masks)
    return result


def _key(score: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 that orders as the scores do; -1 for negative ones."""
    wide = score.clamp_max(torch.finfo(score.dtype).max).to(dtype) + 0.0  # no negative zero
    bits = wide.contiguous().view(torch.int32 if dtype is torch.float32 else torch.int64).to(torch.int64)
    return bits.masked_fill_(wide < 0, -1)


def _thresholds(keys: Sequence[Tensor], left: Tensor, bits: int, shards: Shards) -> tuple[Tensor, Tensor]:
    """The ``left``-th largest key of each ranking, and how many that equal it are to be taken."""
    found = torch.zeros_like(left)
    for shift in range((bits - 1) // _DIGIT * _DIGIT, -1, -_DIGIT):
        bins = torch.stack(
            [
                torch.bincount((key[key >> (shift + _DIGIT) == prefix] >> shift) & ((1 << _DIGIT) - 1), minlength=1 << _DIGIT)
                for key, prefix in zip(keys, found, strict=True)
            ]
        )
        bins = add_up(bins, shards)
        at_least = bins.flip(1).cumsum(1).flip(1)
        digit = (at_least >= left.unsqueeze(1)).sum(1) - 1
        above = at_least.gather(1, digit.unsqueeze(1)).squeeze(1) - bins.gather(1, digit.unsqueeze(1)).squeeze(1)
        left = left - above
        found = (found << _DIGIT) | digit
    return found, left


def _rows(flat: Tensor, ranking: Ranking) -> list[Tensor]:
    """``[rows, rest]`` a tensor: a row holds what lies together in the whole tensor's row-major order."""
    rows: list[Tensor] = []
    for part, score, shards in zip(
        flat.split([score.numel() for score in ranking.scores]), ranking.scores, ranking.shards, strict=True
    ):
        count = prod(score.shape[: shards.axis])
        rows.append(part.reshape(count, part.numel() // count))
    return rows
