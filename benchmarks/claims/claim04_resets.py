"""Claim 4: resetting dormant values at every step is worst; error falls with z and saturates (figures 2 right, 7)."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import below, equal

DENSITY = 0.1


def _intervals(scale: Scale) -> list[int]:
    """z: every step up to about a tenth of the run, and a third of it. The paper's 1 000 steps are about a "
    "hundredth of its runs."""
    steps = scale.steps()
    return sorted({1, max(2, steps // 100), max(3, steps // 10), max(4, steps // 3)})


def tasks(scale: Scale) -> dict[str, list[Task]]:
    return {str(every): scale.tasks("magnitude", DENSITY, reset_every=every) for every in _intervals(scale)}


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    every = _intervals(scale)
    errors = {key: results.values(group) for key, group in named.items()}
    first, tenth, third = (errors[str(one)] for one in (every[0], every[-2], every[-1]))
    checks = [
        below(f"z={every[-2]} minus z=1", tenth, first),
        below(f"z={every[-1]} minus z=1", third, first),
        equal(f"z={every[-1]} minus z={every[-2]}", third, tenth, margin=scale.main.margin),
    ]
    curve = Curve(f"d={DENSITY}", [(one, errors[str(one)]) for one in every])
    return Finding(checks, Chart("Resets", "steps between resets, z", "test error, %", [curve], x_log=True))


CLAIM = Claim(
    4,
    says="Resetting n every step is worst; error falls with z and saturates (paper, figures 2 right and 7).",
    rule="d = 0.1: errors at z = a tenth and a third of the run are below that at z = 1, and within the margin of each other.",
    tasks=tasks,
    judge=judge,
    module="claim04_resets",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
