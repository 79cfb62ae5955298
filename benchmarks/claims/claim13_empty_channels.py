"""Claim 13: sparse training leaves channels empty, and removing them speeds up dense convolution without changing the result."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import below

DENSITIES = (0.2, 0.05, 0.02)


def tasks(scale: Scale) -> dict[str, list[Task]]:
    return {str(density): scale.tasks("sparse-momentum", density, images=True, measure="channels") for density in DENSITIES}


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    lowest = named[str(DENSITIES[-1])]
    empty, speedup = (results.values(lowest, name) for name in ("empty", "speedup"))
    ones, zeros = [1.0] * len(empty), [0.0] * len(empty)
    worst = max(results.get(task)["difference"] for group in named.values() for task in group)
    same = min(results.get(task)["same"] for group in named.values() for task in group)
    exact = [worst] * len(empty)
    checks = [
        below(f"d={DENSITIES[-1]}: no channels minus share of empty channels", zeros, empty),
        below(f"d={DENSITIES[-1]}: 1 minus the speed-up of the forward pass", ones, speedup),
        below("largest relative difference of an output, minus 1e-5", exact, [1e-5] * len(empty)),
    ]
    curves = [
        Curve(
            "share of channels that are empty", [(density, results.values(named[str(density)], "empty")) for density in DENSITIES]
        ),
        Curve(
            "share of multiply-adds left", [(density, results.values(named[str(density)], "operations")) for density in DENSITIES]
        ),
        Curve("1 / speed-up", [(d, [1 / one for one in results.values(named[str(d)], "speedup")]) for d in DENSITIES]),
    ]
    notes = [f"The same class on {100 * same:.1f} % of the images at the least; largest relative difference {worst:.1e}."]
    return Finding(checks, Chart("Empty channels after sparse momentum", "density", "share", curves, x_log=True), notes)


CLAIM = Claim(
    13,
    says="Sparse training leaves channels empty, and removing them speeds up dense convolution without changing the "
    "result (article).",
    rule="d = 0.02: the share of empty channels is above 0 and the speed-up of the forward pass above 1, with their 95 "
    "% intervals; "
    "outputs before and after differ by less than 1e-5 of the largest in every run.",
    tasks=tasks,
    judge=judge,
    module="claim13_empty_channels",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
