"""Claim 6: density 0.5 costs nothing against dense; 0.25 little; 0.1 some (table 1)."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import below

DENSITIES = (0.5, 0.25, 0.1)


def tasks(scale: Scale) -> dict[str, list[Task]]:
    return {"dense": scale.tasks("dense"), **{str(density): scale.tasks("magnitude", density) for density in DENSITIES}}


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    errors = {key: results.values(group) for key, group in named.items()}
    margin = scale.main.margin
    checks = [
        below("d=0.5 minus dense", errors["0.5"], errors["dense"], margin=margin),
        below("d=0.25 minus dense", errors["0.25"], errors["dense"], margin=3 * margin),
        below("dense minus d=0.1", errors["dense"], errors["0.1"]),
    ]
    curves = [
        Curve("magnitude rewiring", [(density, errors[str(density)]) for density in DENSITIES]),
        Curve("dense", [(1.0, errors["dense"])]),
    ]
    return Finding(checks, Chart("Density", "density", "test error, %", curves, x_log=True))


CLAIM = Claim(
    6,
    says="d = 0.5 costs nothing against dense; 0.25 little; 0.1 some (paper, table 1).",
    rule="Above the dense error by less than the margin at d = 0.5, by less than three margins at 0.25, and by more "
    "than nothing at 0.1.",
    tasks=tasks,
    judge=judge,
    module="claim06_densities",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
