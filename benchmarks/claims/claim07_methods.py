"""Claim 7: the recipe beats the lottery ticket, SET and RigL, by more as density falls (figures 4, 13)."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import below

DENSITIES = (0.5, 0.1, 0.05)
OTHERS = ("lottery", "set", "rigl")
# As in the paper: the share that is rewired falls linearly.
OPTIONS = {"set": {"drop_schedule": "linear"}, "rigl": {"drop_schedule": "linear"}}


def tasks(scale: Scale) -> dict[str, list[Task]]:
    return {
        f"{method}/{density}": scale.tasks(method, density, **OPTIONS.get(method, {}))
        for method in ("magnitude", *OTHERS)
        for density in DENSITIES
    }


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    errors = {key: results.values(group) for key, group in named.items()}
    checks = []
    for other in OTHERS:
        leads = {
            density: [
                worse - best for worse, best in zip(errors[f"{other}/{density}"], errors[f"magnitude/{density}"], strict=True)
            ]
            for density in DENSITIES
        }
        for density in (0.1, 0.05):
            told = f"d={density}: recipe minus {other}"
            checks.append(below(told, errors[f"magnitude/{density}"], errors[f"{other}/{density}"]))
        checks.append(below(f"lead over {other} at d=0.5 minus that at d=0.05", leads[0.5], leads[0.05]))
    curves = [
        Curve(method, [(density, errors[f"{method}/{density}"]) for density in DENSITIES]) for method in ("magnitude", *OTHERS)
    ]
    notes = ["The paper sweeps SET's and RigL's rewired share and interval by workload; here both are the methods' defaults."]
    return Finding(checks, Chart("Methods", "density", "test error, %", curves, x_log=True), notes)


CLAIM = Claim(
    7,
    says="The recipe beats LOTTERY, SET and RigL, by more as d falls (paper, figures 4 and 13).",
    rule="At d = 0.1 and 0.05 its error is below that of each, and its lead is larger at d = 0.05 than at d = 0.5.",
    tasks=tasks,
    judge=judge,
    module="claim07_methods",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
