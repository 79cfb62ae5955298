"""Claim: channel pruning changes no output, on every model of the zoo that torch.export takes, biases and batch norms random.

    python benchmarks/exactness.py                   the list of benchmarks/coverage.py; hours, goes on where it was stopped
    python benchmarks/exactness.py --only timm

In a random half of the layers a random half of the filters is set to zero; biases, shifts and statistics of batch norms stay, and
are random. Models that torch.export refuses are pruned in parts. The table has the largest errors, what was removed of an upper
bound, and why channels had to stay. Bars: 1e-5 of the largest value in float32, 1e-10 in float64.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sweep import prepare_path, result_path, sweep, write_json, write_text


def main(
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("exactness-results"),
    only: Annotated[list[str] | None, typer.Option(help="Globs of library or library/name.")] = None,
    jobs: Annotated[int, typer.Option(help="Models side by side.")] = 2,
    timeout: Annotated[int, typer.Option(help="Seconds for one model.")] = 1200,
) -> None:
    """Run the sweep and write its table."""
    from benchmarks.coverage import choose_names

    chosen = choose_names(only)
    pending = [name for name in chosen if not result_path(out, name).exists()]
    sweep(pending, run_one, out, preload=("benchmarks.exactness_checks",), jobs=jobs, timeout=timeout, line=_line, lost=_lost)
    results = [json.loads(path.read_text()) for path in sorted(out.glob("models/*/*.json"))]
    write_text(out / "exactness.md", page(results))
    print(f"{sum(result['ok'] for result in results)} of {len(results)} models within the bars")


def run_one(name: str, path: str) -> None:
    """Examine one model and write the result; the process's own entry point."""
    import torch

    from benchmarks.exactness_checks import examine
    from benchmarks.zoo import find

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    write_json(Path(path), examine(find(name)))


def page(results: list[dict[str, Any]]) -> str:
    """The Markdown table, and the reasons for what had to stay, the most frequent first."""
    from benchmarks.coverage_table import machine, table

    rows, reasons = [], Counter[str]()
    for result in results:
        parts = result["parts"]
        reasons.update(reason for part in parts for reason in part["pinned"] + part["refused"])
        removed, removable = (sum(part[key] for part in parts) for key in ("removed", "removable"))
        total = sum(part["parameters"] for part in parts)
        rows.append(
            [
                f"{result['library']}/{result['name']}",
                "yes" if result["ok"] else f"NO {result.get('problem', '')}",
                *(
                    f"{max((part['errors'][name] for part in parts), default=float('nan')):.1e}"
                    for name in ("float32", "float64")
                ),
                f"{removed / max(total, 1):.1%}",
                f"{removed / max(removable, 1):.1%}",
                ", ".join(part["path"] or "whole" for part in parts),
            ]
        )
    header = ["model", "within the bars", "float32", "float64", "parameters removed", "of the upper bound", "parts"]
    lines = [
        "# Exactness of channel pruning",
        "",
        str(machine()),
        "",
        *table(header, rows),
        "",
        "## Why channels had to stay",
        "",
    ]
    lines += [f"- {count} models: {reason}" for reason, count in reasons.most_common(60)]
    return "\n".join(lines) + "\n"


def _lost(name: str, why: str) -> dict[str, Any]:
    library, _, rest = name.partition("/")
    return {"library": library, "name": rest, "family": "", "parts": [], "ok": False, "problem": why, "seconds": 0}


def _line(result: dict[str, Any]) -> str:
    worst = max((part["errors"]["float64"] for part in result["parts"]), default=float("nan"))
    told = "ok" if result["ok"] else result.get("problem", "outside the bars")[:200]
    return f"{result['library']}/{result['name']} {result['seconds']:.0f} s, float64 {worst:.1e}: {told}"


if __name__ == "__main__":
    prepare_path()
    typer.run(main)
