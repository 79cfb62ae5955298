"""Claim 14: sparse networks' channels are less class-specialised than dense ones'."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import below

DENSITIES = (0.2, 0.05)


def tasks(scale: Scale) -> dict[str, list[Task]]:
    named = {"dense": scale.tasks("dense", images=True, measure="specialization")}
    for density in DENSITIES:
        named[str(density)] = scale.tasks("sparse-momentum", density, images=True, measure="specialization")
    return named


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    found = {key: results.values(group, "specialization") for key, group in named.items()}
    checks = [below(f"d={density}: sparse minus dense", found[str(density)], found["dense"]) for density in DENSITIES]
    curves = [
        Curve("sparse momentum", [(density, found[str(density)]) for density in DENSITIES]),
        Curve("dense", [(1.0, found["dense"])]),
    ]
    return Finding(checks, Chart("Class specialization", "density", "largest class's share, mean", curves, x_log=True))


CLAIM = Claim(
    14,
    says="Sparse networks' channels are less class-specialised than dense ones' (article; published means differ by "
    ".010 to .017, and for "
    "WRN-28-2 by .003 the other way).",
    rule="At d = 0.2 and 0.05 the mean class specialization of convolutions' channels on test images is below that of "
    "dense nets.",
    tasks=tasks,
    judge=judge,
    module="claim14_specialization",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
