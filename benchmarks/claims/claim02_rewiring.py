"""Claim 2: rewiring frequency does not matter at density 0.5, and error grows with r when d is small (figures 2 left, 5)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import below, equal

DENSITIES = (0.5, 0.1)


def _intervals(scale: Scale) -> list[int]:
    """r: every step, then tenfold, and three times in the run, each of them long after a reset and long before the end."""
    steps = scale.steps()
    return sorted({1, 10, min(100, steps // 8), steps * 11 // 40})


def tasks(scale: Scale) -> dict[str, list[Task]]:
    return {
        f"{density}/{every}": scale.tasks("magnitude", density, rewire_every=every)
        for density in DENSITIES
        for every in _intervals(scale)
    }


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    intervals = _intervals(scale)
    errors = {key: results.values(group) for key, group in named.items()}
    margin = scale.main.margin
    checks = [equal(f"d=0.5: r={r} minus r=1", errors[f"0.5/{r}"], errors["0.5/1"], margin=margin) for r in intervals[1:]]
    checks += [
        below(f"d=0.1: r={smaller} minus r={larger}", errors[f"0.1/{smaller}"], errors[f"0.1/{larger}"])
        for smaller, larger in pairwise(intervals)
    ]
    curves = [Curve(f"d={density}", [(every, errors[f"{density}/{every}"]) for every in intervals]) for density in DENSITIES]
    return Finding(checks, Chart("Rewiring", "steps between rewirings, r", "test error, %", curves, x_log=True))


CLAIM = Claim(
    2,
    says="Rewiring frequency does not matter at d = 0.5, and error grows with r when d << 0.5 (paper, figures 2 left and 5).",
    rule="d = 0.5: the error at each larger r is within the margin of that at r = 1. d = 0.1: the error at each r is below "
    "that at the next larger one. r is 1, 10, 100 and a little more than a quarter of the run.",
    tasks=tasks,
    judge=judge,
    module="claim02_rewiring",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
