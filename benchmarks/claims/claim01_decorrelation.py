"""Claim 1: weights that pruning removes decorrelate sooner than those it keeps (figure 1)."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import below


def tasks(scale: Scale) -> dict[str, list[Task]]:
    return {"dense": scale.tasks("dense", images=True, measure="decorrelation")}


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    small, large = (results.values(named["dense"], name) for name in ("small", "large"))
    bins = results.get(named["dense"][0])["bins"]
    curves = [Curve(name, [(magnitude, [time]) for magnitude, time in points]) for name, points in bins.items()]
    chart = Chart("Time until weights decorrelate, seed 0", "|w| at the end", "share of training, median of a bin", curves)
    told = "median time, smaller half of |w| minus larger half, mean over layers"
    return Finding([below(told, small, large)], chart)


CLAIM = Claim(
    1,
    says="Weights that pruning removes decorrelate sooner than those it keeps (paper, figure 1).",
    rule="In dense training the median decorrelation time of the half of each layer's weights with the smallest final "
    "|w| is below "
    "that of the other half, averaged over layers: the 95 % interval of the difference over seeds lies below zero.",
    tasks=tasks,
    judge=judge,
    module="claim01_decorrelation",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
