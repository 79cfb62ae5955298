"""An approximation to the best N:M transposable mask of m x m blocks, for any N and M."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_blocks(scores: Tensor, n: int) -> Tensor:
    """Masks with exactly ``n`` entries in every row and column of each block.

    First greedily: entries in order of falling score (of equal ones the first in row-major order), each accepted while
    its row and its column have fewer than n. Where that leaves row i and column j short, (i, j) is taken already; then
    some taken (a, b) gives way to (i, b) and (a, j). Of all such exchanges, the one that gains most is made.

    Such an exchange always exists: column j is short, so more than m - n rows a lack (a, j); each of them is full (were
    it short too, the greedy choice would have taken (a, j)), so one of its n entries stands in a column that row i
    lacks. It changes no other row's or column's count and leaves what the argument needs. At most n * n / 4 are needed.

    Args:
        scores: ``[m, m, blocks]``, non-negative and finite.
        n: entries of each row and column, less than m.

    Returns:
        bool ``[m, m, blocks]``. The number of operations is fixed and nothing waits for the device.
    """
    m, _, blocks = scores.shape
    flat = scores.reshape(m * m, blocks)
    order = flat.argsort(dim=0, descending=True, stable=True)
    rows = torch.zeros(m, blocks, dtype=torch.int8, device=scores.device)
    columns = torch.zeros_like(rows)
    taken = torch.zeros(m * m, blocks, dtype=torch.bool, device=scores.device)
    for step in range(m * m):
        place = order[step : step + 1]
        row, column = place // m, place % m
        accepted = (rows.gather(0, row) < n) & (columns.gather(0, column) < n)
        taken.scatter_(0, place, accepted)
        rows.scatter_add_(0, row, accepted.to(torch.int8))
        columns.scatter_add_(0, column, accepted.to(torch.int8))
    mask = taken.view(m, m, blocks)
    for _ in range(n * n // 4):
        _exchange(mask, scores, n)
    return mask


def _exchange(mask: Tensor, scores: Tensor, n: int) -> None:
    """Add one entry to the first short row and the first short column of each block that has them."""
    m, _, blocks = mask.shape
    short_rows, short_columns = mask.sum(1) < n, mask.sum(0) < n
    needed = short_rows.any(0)
    i = short_rows.byte().argmax(0).view(1, 1, blocks)
    j = short_columns.byte().argmax(0).view(1, 1, blocks)
    at_row, at_column = i.expand(1, m, blocks), j.expand(m, 1, blocks)
    # Below, entry [a, b] speaks of the exchange of (a, b) for (i, b) and (a, j).
    allowed = mask & ~mask.gather(0, at_row) & ~mask.gather(1, at_column) & needed
    wide = scores.to(torch.float32) if scores.dtype in (torch.float16, torch.bfloat16) else scores
    gain = wide.gather(0, at_row) + wide.gather(1, at_column) - wide
    best = gain.masked_fill(~allowed, float("-inf")).view(m * m, blocks).argmax(0)
    a, b = best // m, best % m
    every = torch.arange(blocks, device=mask.device)
    i, j = i.view(blocks), j.view(blocks)
    mask[a, b, every] &= ~needed
    mask[i, b, every] |= needed
    mask[a, j, every] |= needed
