"""Rules that turn figures of several seeds into a verdict. They are the same for all claims, and stand before any run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Word = Literal["holds", "does not hold", "undecided"]
# Student's t for 97.5 %, by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and a 95 % interval for it."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Check:
    """One thing that a claim says, in words, and what the figures say of it."""

    told: str
    word: Word


def student(count: int) -> float:
    """Standard errors on each side of the mean of ``count`` values that make a 95 % interval."""
    return _STUDENT.get(count - 1, 2.228)


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """``first - second``, paired by seed: the same first weights and the same batches."""
    pairs = [one - other for one, other in zip(first, second, strict=True)]
    mean = statistics.fmean(pairs)
    if len(pairs) < 2:
        return Difference(mean, -math.inf, math.inf)
    half = student(len(pairs)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(mean, mean - half, mean + half)


def below(name: str, first: Sequence[float], second: Sequence[float], *, margin: float = 0.0) -> Check:
    """Whether ``first`` is below ``second + margin``: holds where all of the interval is, fails where none of it is.

    With margin 0 this is "first is smaller than second"; with a margin, "first is larger by no more than that".
    """
    found = difference(first, second)
    word: Word = "holds" if found.high < margin else "does not hold" if found.low >= margin else "undecided"
    bound = f" (allowed: below {margin:+.2f})" if margin else ""
    return Check(f"{name}: {found.mean:+.3f}, 95 % interval {found.low:+.3f} to {found.high:+.3f}{bound}", word)


def equal(name: str, first: Sequence[float], second: Sequence[float], *, margin: float) -> Check:
    """Whether two are within ``margin`` of each other, either way."""
    found = difference(first, second)
    inside = -margin < found.low and found.high < margin
    outside = found.low >= margin or found.high <= -margin
    word: Word = "holds" if inside else "does not hold" if outside else "undecided"
    told = f"{found.mean:+.3f}, 95 % interval {found.low:+.3f} to {found.high:+.3f} (allowed: {margin:.2f} either way)"
    return Check(f"{name}: {told}", word)


def together(checks: Iterable[Check]) -> Word:
    """A claim holds where all that it says does, and does not where any of it does not."""
    words = [check.word for check in checks]
    if "does not hold" in words:
        return "does not hold"
    return "undecided" if "undecided" in words or not words else "holds"
