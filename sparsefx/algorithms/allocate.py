"""Dividing a whole number among layers, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence


def allocate(total: int, shares: Sequence[float], capacities: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to ``shares`` that add up to ``total``; what does not fit in one place goes to the others.

    Places that are full are left out and the rest is divided again, until all fit; fractions are rounded by the method
    of largest remainders, the first of equal ones up.

    Args:
        total: from 0 to the sum of the capacities.
        shares: of any scale. Negative ones, NaN and infinity count as 0; where no open place has a share, the room left counts.
        capacities: the most that each place takes.

    Raises:
        ValueError: ``total`` does not fit.
    """
    if not 0 <= total <= sum(capacities):
        raise ValueError(f"{total} cannot be divided among places that take {sum(capacities)}")
    given = [0] * len(capacities)
    left = total
    while left > 0:
        places = [place for place, capacity in enumerate(capacities) if given[place] < capacity]
        room = [capacities[place] - given[place] for place in places]
        wanted = [shares[place] if 0 < shares[place] < math.inf else 0.0 for place in places]
        largest = max(wanted)
        # Scaled by the largest, so that the sum neither overflows nor vanishes.
        scaled = [share / largest for share in wanted] if largest > 0 else [float(free) for free in room]
        ideal = [left * (share / math.fsum(scaled)) for share in scaled]
        full = [index for index in range(len(places)) if ideal[index] >= room[index]]
        if full:
            for index in full:
                given[places[index]] += room[index]
                left -= room[index]
            continue
        whole = [int(value) for value in ideal]
        by_remainder = sorted(range(len(places)), key=lambda index: (whole[index] - ideal[index], index))
        missing = left - sum(whole)
        for position, index in enumerate(by_remainder):
            given[places[index]] += whole[index] + (position < missing)
        left = 0
    return given


def none_empty(counts: Sequence[int]) -> list[int]:
    """Give one to each place that has none, at the cost of the largest while that has more than one."""
    counts = list(counts)
    for place, count in enumerate(counts):
        if count == 0:
            richest = counts.index(max(counts))
            counts[place], counts[richest] = 1, max(1, counts[richest] - 1)
    return counts
