"""Claim 12: momentum redistribution and momentum growth each help (ablation of the article)."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import below

DENSITY = 0.05
VARIANTS = {
    "as published": {},
    "no redistribution": {"redistribution": "none"},
    "random growth": {"growth": "random"},
    "neither": {"redistribution": "none", "growth": "random"},
}


def tasks(scale: Scale) -> dict[str, list[Task]]:
    return {name: scale.tasks("sparse-momentum", DENSITY, **options) for name, options in VARIANTS.items()}


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    errors = {key: results.values(group) for key, group in named.items()}
    checks = [
        below(f"as published minus {name}", errors["as published"], errors[name])
        for name in ("no redistribution", "random growth")
    ]
    curve = Curve(f"d={DENSITY}", [(index, errors[name]) for index, name in enumerate(VARIANTS)])
    return Finding(checks, Chart("Parts of sparse momentum", "", "test error, %", [curve], x_names=tuple(VARIANTS)))


CLAIM = Claim(
    12,
    says="Momentum redistribution and momentum growth each help (article, ablation).",
    rule="d = 0.05: the error is below that without redistribution, and below that with random growth.",
    tasks=tasks,
    judge=judge,
    module="claim12_ablation",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
