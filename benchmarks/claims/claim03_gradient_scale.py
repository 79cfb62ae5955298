"""Claim 3: error grows as the scale s of dormant gradients goes to 0, more so for small d (figures 2 middle, 6)."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import below

DENSITIES = (0.5, 0.1)
SCALES = (0.0, 0.1, 0.5, 1.0)


def tasks(scale: Scale) -> dict[str, list[Task]]:
    return {f"{density}/{factor}": scale.tasks("magnitude", density, scale=factor) for density in DENSITIES for factor in SCALES}


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    errors = {key: results.values(group) for key, group in named.items()}
    growth = {
        density: [zero - one for zero, one in zip(errors[f"{density}/0.0"], errors[f"{density}/1.0"], strict=True)]
        for density in DENSITIES
    }
    checks = [
        below("d=0.1: error at s=1 minus error at s=0", errors["0.1/1.0"], errors["0.1/0.0"]),
        below("what s=0 costs at d=0.5 minus what it costs at d=0.1", growth[0.5], growth[0.1]),
    ]
    curves = [Curve(f"d={density}", [(factor, errors[f"{density}/{factor}"]) for factor in SCALES]) for density in DENSITIES]
    return Finding(checks, Chart("Updates of weights that do not participate", "gradient scale, s", "test error, %", curves))


CLAIM = Claim(
    3,
    says="Error grows as s -> 0, more so for small d (paper, figures 2 middle and 6).",
    rule="d = 0.1: the error at s = 1 is below that at s = 0; and what s = 0 costs at d = 0.1 is more than what it "
    "costs at d = 0.5.",
    tasks=tasks,
    judge=judge,
    module="claim03_gradient_scale",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
