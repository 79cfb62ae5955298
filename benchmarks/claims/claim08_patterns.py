"""Claim 8: 2:4 along one axis and along both match dense (table 2); block sparsity does not keep accuracy (table 3)."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.claims.claim import Chart, Claim, Curve, Finding, main
from benchmarks.claims.results import Results
from benchmarks.claims.task import Scale, Task
from benchmarks.claims.verdict import below

PATTERNS = ("2:4", "2:4-transposable")
BLOCKS = ("block:1x4", "block:4x4", "block:8x8")


def tasks(scale: Scale) -> dict[str, list[Task]]:
    named = {pattern: scale.tasks("magnitude", 0.5, pattern=pattern, images=True) for pattern in (*PATTERNS, *BLOCKS)}
    return {
        **named,
        "unstructured": scale.tasks("magnitude", 0.5, images=True),
        "dense": scale.tasks("dense", images=True),
        "small": scale.tasks("small", 0.5, images=True),
    }


def judge(named: Mapping[str, list[Task]], results: Results, scale: Scale) -> Finding:
    errors = {key: results.values(group) for key, group in named.items()}
    margin = scale.images.margin
    checks = [below(f"{pattern} minus dense", errors[pattern], errors["dense"], margin=margin) for pattern in PATTERNS]
    checks += [below(f"dense minus {block}", errors["dense"], errors[block]) for block in BLOCKS]
    checks += [below(f"SMALL minus {block}", errors["small"], errors[block], margin=margin) for block in BLOCKS]
    names = ("dense", "unstructured", *PATTERNS, *BLOCKS, "small")
    curve = Curve("d=0.5", [(index, errors[name]) for index, name in enumerate(names)])
    return Finding(checks, Chart("Patterns", "", "test error, %", [curve], x_names=names))


CLAIM = Claim(
    8,
    says="2:4 1D and 2:4 2D match dense (paper, table 2); block sparsity fails to keep accuracy, and is no better than "
    "SMALL (table 3).",
    rule="2:4 and 2:4-transposable are above the dense error by less than the margin. Blocks of 1x4, 4x4 and 8x8 at d = 0.5 "
    "have an error above the dense one, and one that is below SMALL's by less than the margin.",
    tasks=tasks,
    judge=judge,
    module="claim08_patterns",
)


if __name__ == "__main__":
    main(CLAIM, description=__doc__ or "")
