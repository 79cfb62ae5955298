"""Claim: channel pruning changes no output, on every model of the zoo that torch.export takes, biases and batch norms random.

    python benchmarks/exactness.py                   the list of benchmarks/coverage.py; hours, goes on where it was stopped
    python benchmarks/exactness.py --only timm

In a random half of the layers a random half of the filters is set to zero; biases, shifts and statistics of batch norms stay, and
are random. Models that torch.export refuses are pruned in parts. The table has the largest errors, what was removed of
what an oracle says could be (benchmarks/oracle: by brute force, without the graph), and why channels had to stay. Bars: 1e-5
of the largest value in float32, 1e-10 in float64. The model's own rounding is what it is off its own outputs in float64 before
anything is removed: below that nobody can tell two float32 models apart.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sweep import prepare_path, result_path, sweep, write_json, write_text

_PLACE = re.compile(r" \([\w.]*\)$")
_ORACLE_SECONDS = "SPARSEFX_ORACLE_SECONDS"  # for the processes of the models


def main(
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("exactness-results"),
    only: Annotated[list[str] | None, typer.Option(help="Globs of library or library/name.")] = None,
    jobs: Annotated[int, typer.Option(help="Models side by side.")] = 2,
    timeout: Annotated[int, typer.Option(help="Seconds for one model.")] = 1200,
    names: Annotated[Path | None, typer.Option(help="File of names, one a line, to run in this order.")] = None,
    oracle_seconds: Annotated[float, typer.Option(help="Processor's seconds for the oracle, a model or part.")] = 120,
    again: Annotated[bool, typer.Option(help="Run once more what was outside the bars or was lost.")] = False,
) -> None:
    """Run the sweep and write its table."""
    from benchmarks.coverage import choose_names

    os.environ[_ORACLE_SECONDS] = str(oracle_seconds)
    chosen = choose_names(only) if names is None else names.read_text().split()
    pending = [name for name in chosen if _is_pending(result_path(out, name), again)]
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
    write_json(Path(path), examine(find(name), float(os.environ[_ORACLE_SECONDS])))


def _is_pending(path: Path, again: bool) -> bool:
    return not path.exists() or (again and not json.loads(path.read_text())["ok"])


def page(results: list[dict[str, Any]]) -> str:
    """The Markdown table, medians by library, and the reasons for what had to stay, the most frequent first."""
    from benchmarks.coverage_table import machine, table

    rows, reasons = [], Counter[str]()
    by_library: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        parts = result["parts"]
        by_library.setdefault(result["library"], []).append(result)
        # Of one model each reason counts once, wherever in the model.
        reasons.update({_PLACE.sub("", one) for part in parts for text in part["pinned"] for one in text.split("; ")})
        reasons.update({_PLACE.sub("", reason) for part in parts for reason in part["refused"]})
        total, removed = (sum(part[key] for part in parts) for key in ("parameters", "removed"))
        rows.append(
            [
                f"{result['library']}/{result['name']}",
                "yes" if result["ok"] else f"NO {result.get('problem', '')[:150]}",
                *(
                    f"{max((part['errors'][name] for part in parts), default=float('nan')):.1e}"
                    for name in ("float32", "float64")
                ),
                f"{max((part.get('rounding', float('nan')) for part in parts), default=float('nan')):.1e}",
                f"{removed / max(total, 1):.1%}",
                _told_share(result),
                ", ".join(part["path"] or "whole" for part in parts),
            ]
        )
    header = ["model", "within the bars", "float32", "float64", "own rounding", "parameters removed", "of the oracle's", "parts"]
    lines = ["# Exactness of channel pruning", "", str(machine()), "", *table(header, rows), "", "## By library", ""]
    for library, group in by_library.items():
        shares = [found for result in group if (found := share(result)) is not None]
        middle = f"{statistics.median(shares):.1%}" if shares else "-"
        within = sum(result["ok"] for result in group)
        lines.append(
            f"- {library}: {len(group)} models, {within} within the bars; median of removed over the oracle's {middle} "
            f"({len(shares)} models)"
        )
    lines += ["", "## Why channels had to stay", ""]
    lines += [f"- {count} models: {reason}" for reason, count in reasons.most_common(60) if reason]
    return "\n".join(lines) + "\n"


def share(result: dict[str, Any]) -> float | None:
    """Weights that pruning removed over those that the oracle would, 1 where there are none; None where it was not done."""
    from benchmarks.oracle import CONFIRMED

    found = [part["oracle"] for part in result["parts"]]
    if not found or any("told" in oracle or oracle["difference"] > CONFIRMED for oracle in found):
        return None
    removed, removable = (sum(oracle[key] for oracle in found) for key in ("removed", "removable"))
    return removed / removable if removable else 1.0


def _told_share(result: dict[str, Any]) -> str:
    from benchmarks.oracle import CONFIRMED

    found = share(result)
    if found is not None:
        return f"{found:.1%}"
    told = {
        str(part["oracle"].get("told") or f"not confirmed, {part['oracle']['difference']:.0e}")
        for part in result["parts"]
        if "told" in part["oracle"] or part["oracle"]["difference"] > CONFIRMED
    }
    return "; ".join(sorted(told)) or "-"


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
