"""Claim 11: sparse momentum beats SET, DSR, DeepR and SNIP at equal density, and comes near dense at 5 to 20 %."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import below

DENSITIES = (0.2, 0.1, 0.05)
OTHERS = ("set", "dsr", "deep-r", "snip")


def tasks(scale: Scale) -> dict[str, list[Task]]:
    named = {
        f"{method}/{density}": scale.tasks(method, density) for method in ("sparse-momentum", *OTHERS) for density in DENSITIES
    }
    return {**named, "dense": scale.tasks("dense")}


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    errors = {key: results.values(group) for key, group in named.items()}
    checks = [
        below(f"d={density}: sparse momentum minus {other}", errors[f"sparse-momentum/{density}"], errors[f"{other}/{density}"])
        for other in OTHERS
        for density in DENSITIES
    ]
    margin = 3 * scale.main.margin
    checks += [
        below(f"d={density}: sparse momentum minus dense", errors[f"sparse-momentum/{density}"], errors["dense"], margin=margin)
        for density in DENSITIES
    ]
    curves = [
        Curve(method, [(density, errors[f"{method}/{density}"]) for density in DENSITIES])
        for method in ("sparse-momentum", *OTHERS)
    ]
    curves.append(Curve("dense", [(1.0, errors["dense"])]))
    return Finding(checks, Chart("Sparse momentum and others", "density", "test error, %", curves, x_log=True))


CLAIM = Claim(
    11,
    says="Sparse momentum beats SET, DSR, DeepR and SNIP at equal density, and comes near dense at 5 to 20 % (article).",
    rule="At d = 0.2, 0.1 and 0.05 its error is below that of each of them, and above the dense error by less than "
    "three margins.",
    tasks=tasks,
    judge=judge,
    module="claim11_sparse_momentum",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
