"""Claim 9: f is about 1 at density 0.5, and sparse beats SMALL at every density (figure 9)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import Check, Word, below, student
from sparsefx.analysis import Estimate, accuracy_fraction
from sparsefx.errors import OptionError

DENSITIES = (0.5, 0.25, 0.1)


def tasks(scale: Scale) -> dict[str, list[Task]]:
    named = {"dense": scale.tasks("dense")}
    for density in DENSITIES:
        named[f"sparse/{density}"] = scale.tasks("magnitude", density)
        named[f"small/{density}"] = scale.tasks("small", density)
    return named


def _fraction(dense: list[float], sparse: list[float], small: list[float]) -> Estimate:
    try:
        return accuracy_fraction(dense, sparse, small)
    except OptionError:  # dense and SMALL are equally good: there is no way to go a part of
        return Estimate(math.nan, math.nan, len(dense))


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    errors = {key: results.values(group) for key, group in named.items()}
    fractions = {
        density: _fraction(errors["dense"], errors[f"sparse/{density}"], errors[f"small/{density}"]) for density in DENSITIES
    }
    half = fractions[0.5]
    width = student(half.count) * half.standard_error
    low, high = half.mean - width, half.mean + width
    # A fraction of a way that is lost in the noise is no fraction.
    way = below("way from dense to SMALL at d=0.5, reversed", errors["dense"], errors["small/0.5"])
    word: Word = "undecided" if way.word != "holds" else "holds" if low > 0.8 else "does not hold" if high < 0.8 else "undecided"
    checks = [Check(f"f at d=0.5: {half.mean:.2f} +- {half.standard_error:.2f} ({way.told})", word)]
    checks += [
        below(f"d={density}: sparse minus SMALL", errors[f"sparse/{density}"], errors[f"small/{density}"])
        for density in DENSITIES
    ]
    curves = [
        Curve("sparse", [(density, errors[f"sparse/{density}"]) for density in DENSITIES]),
        Curve("SMALL", [(density, errors[f"small/{density}"]) for density in DENSITIES]),
        Curve("dense", [(1.0, errors["dense"])]),
    ]
    notes = [f"f at d={density}: {one.mean:.3f} +- {one.standard_error:.3f}" for density, one in fractions.items()]
    return Finding(checks, Chart("DENSE, SPARSE and SMALL", "density", "test error, %", curves, x_log=True), notes)


CLAIM = Claim(
    9,
    says="f is about 1 at d = 0.5, and sparse beats SMALL at every d (paper, figure 9).",
    rule="f at d = 0.5 is above 0.8 with its 95 % interval, where dense is better than SMALL beyond doubt; and the "
    "sparse error is "
    "below SMALL's at d = 0.5, 0.25 and 0.1.",
    tasks=tasks,
    judge=judge,
    module="claim09_fraction",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
