"""The best of the 90 masks of a 4 x 4 block with two entries in every row and column, exactly.

The two upper rows choose each column 0, 1 or 2 times, and the two lower rows must choose what is left. There are 19 such
*classes*, so the best upper and the best lower half are found for each class alone, and 19 sums are compared:

- classes 0 to 5: both upper rows hold the same pair of columns, both lower rows the other pair; one option each;
- class 6: the second row of each half holds the columns that the first lacks; six options each, numbered by the
  first row's pair;
- classes 7 to 18, one for each ordered pair of columns (a, b), in lexicographic order: the upper rows share column a and
  leave out b, the lower rows share b and leave out a; two options each, with c < d the other columns: the first row
  of the half holds c and the second d, or the first holds d and the second c.

Pairs of columns are numbered 0 to 5 in lexicographic order: 01, 02, 03, 12, 13, 23.

Ties: the first in the order (class, upper option, lower option) wins. Sums are taken in float64 as (pair + pair) for each half
and then half + half; they are exact unless a block's magnitudes span more than about 26 binary orders in float32.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from sparsefx.patterns.selection import summation_dtype

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
_SHARED = tuple(permutations(range(4), 2))
_CHUNK_ON_CPU = 1 << 13  # blocks at a time, so that the intermediate values stay in the cache
_CHUNK_ON_DEVICE = 1 << 22


def _pair(first: int, second: int) -> int:
    return PAIRS.index((min(first, second), max(first, second)))


def _rows_of_half(shared: int, missing: int) -> tuple[int, int]:
    """The pairs of the two rows that share a column, in option 0."""
    c, d = (column for column in range(4) if column not in (shared, missing))
    return _pair(shared, c), _pair(shared, d)


_UPPER = tuple(_rows_of_half(a, b) for a, b in _SHARED)
_LOWER = tuple(_rows_of_half(b, a) for a, b in _SHARED)


def all_blocks() -> list[tuple[int, int, int, int]]:
    """The 90 masks in the order that decides ties, each as the pair numbers of its four rows."""
    masks = [(pair, pair, 5 - pair, 5 - pair) for pair in range(6)]
    masks += [(upper, 5 - upper, lower, 5 - lower) for upper in range(6) for lower in range(6)]
    for upper, lower in zip(_UPPER, _LOWER, strict=True):
        masks += [(*u, *low) for u in (upper, upper[::-1]) for low in (lower, lower[::-1])]
    return masks


def best_blocks(scores: Tensor) -> Tensor:
    """The best mask of each block.

    Args:
        scores: ``[4, 4, blocks]``, non-negative and finite.

    Returns:
        bool ``[4, 4, blocks]``. Nothing waits for the device.
    """
    chunk = _CHUNK_ON_CPU if scores.device.type == "cpu" else _CHUNK_ON_DEVICE
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for start in range(0, scores.shape[2], chunk):
        mask[:, :, start : start + chunk] = _best(scores[:, :, start : start + chunk])
    return mask


def _best(scores: Tensor) -> Tensor:
    wide = scores.to(summation_dtype(scores))
    # pairs[i]: [6, blocks], what row i keeps with each pair of columns.
    pairs = [torch.stack([row[first] + row[second] for first, second in PAIRS]) for row in wide]
    upper, upper_rows = _best_half(pairs[0], pairs[1], _UPPER, mirrored=False)
    lower, lower_rows = _best_half(pairs[2], pairs[3], _LOWER, mirrored=True)
    chosen = _first_largest(upper + lower)[1].to(torch.int64)
    rows = torch.cat([half.gather(1, chosen.expand(2, -1, -1)) for half in (upper_rows, lower_rows)])
    return torch.cat([_columns(row) for row in rows]).view(4, 4, -1)


def _best_half(first: Tensor, second: Tensor, shared: tuple[tuple[int, int], ...], *, mirrored: bool) -> tuple[Tensor, Tensor]:
    """For each of the 19 classes, the best sum ``[19, blocks]`` and the pairs of the two rows ``[2, 19, blocks]``."""
    blocks = first.shape[1]
    number = torch.arange(6, device=first.device, dtype=torch.int8).view(6, 1)
    equal = first + second
    equal_rows = number.expand(6, blocks)
    if mirrored:
        equal, equal_rows = equal.flip(0), equal_rows.flip(0)
    opposite, opposite_pair = _first_largest(first + second.flip(0))
    straight = torch.stack([first[c] + second[d] for c, d in shared])
    crossed = torch.stack([first[d] + second[c] for c, d in shared])
    cross = crossed > straight
    c_pair = torch.cat([number[c] for c, _ in shared]).view(12, 1)
    d_pair = torch.cat([number[d] for _, d in shared]).view(12, 1)
    sums = torch.cat([equal, opposite, torch.maximum(straight, crossed)])
    first_rows = torch.cat([equal_rows, opposite_pair, torch.where(cross, d_pair, c_pair)])
    second_rows = torch.cat([equal_rows, 5 - opposite_pair, torch.where(cross, c_pair, d_pair)])
    return sums, torch.stack([first_rows, second_rows])


def _first_largest(sums: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each column and where it comes first, ``[1, blocks]`` both; torch's own argmax is much slower."""
    best = sums.amax(0, keepdim=True)
    last = sums.shape[0] - 1
    number = torch.arange(last + 1, device=sums.device, dtype=torch.int8).view(-1, 1)
    # NaN equals nothing; any valid position will do for it.
    return best, torch.where(sums == best, number, last).amin(0, keepdim=True)


def _columns(pair: Tensor) -> Tensor:
    """Bool ``[4, blocks]``: which columns a row holds, from its pair's number ``[blocks]``."""
    return torch.stack(
        [
            pair <= 2,
            (pair == 0) | (pair == 3) | (pair == 4),
            (pair == 1) | (pair == 3) | (pair == 5),
            (pair == 2) | (pair >= 4),
        ]
    )
