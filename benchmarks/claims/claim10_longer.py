"""Claim 10: longer training closes the gap for d >= 0.25, and recovering dense accuracy is quick near t = 1 (figures 10, 11)."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import below

DENSITIES = (0.25, 0.1)
TIMES = (1, 2, 4)


def tasks(scale: Scale) -> dict[str, list[Task]]:
    named = {f"dense/{time}": scale.tasks("dense", longer=time) for time in TIMES}
    for density in DENSITIES:
        named.update({f"{density}/{time}": scale.tasks("magnitude", density, longer=time) for time in TIMES})
    return named


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    errors = {key: results.values(group) for key, group in named.items()}
    margin = scale.main.margin
    last = TIMES[-1]
    gaps = {
        time: [sparse - dense for sparse, dense in zip(errors[f"0.25/{time}"], errors[f"dense/{time}"], strict=True)]
        for time in (1, last)
    }
    checks = [
        below(f"gap between d=0.25 and dense: at t={last} minus at t=1", gaps[last], gaps[1]),
        below(f"t={last}: d=0.25 minus dense", errors[f"0.25/{last}"], errors[f"dense/{last}"], margin=margin),
        below("d=0.25 at t=2 minus dense at t=1", errors["0.25/2"], errors["dense/1"], margin=margin),
    ]
    curves = [Curve("dense", [(time, errors[f"dense/{time}"]) for time in TIMES])]
    curves += [Curve(f"d={density}", [(time, errors[f"{density}/{time}"]) for time in TIMES]) for density in DENSITIES]
    return Finding(checks, Chart("Longer training", "training time, t", "test error, %", curves))


CLAIM = Claim(
    10,
    says="Longer training closes the gap for d >= 0.25, and the time to recover dense accuracy is short when t is near 1 (paper, "
    "figures 10 and 11).",
    rule="d = 0.25: what it is above the dense error is less when both train four times as long than at t = 1, and then less "
    "than the margin; and it is above the error of a dense net of t = 1 by less than the margin when it trains twice as long.",
    tasks=tasks,
    judge=judge,
    module="claim10_longer",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
