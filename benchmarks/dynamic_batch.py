"""Claim: every model of the zoo that torch.export takes becomes an ONNX file with a free batch, right at batches 1, 3 and 5.

    python benchmarks/dynamic_batch.py                      all of torchvision, timm's families, transformers, the shipped ones
    python benchmarks/dynamic_batch.py --only timm --jobs 2
    python benchmarks/dynamic_batch.py --again failed       once more what failed; finished models are not run twice otherwise

2:4 masks by magnitude, examples of batch 2, `sparsefx.export_onnx(..., dynamic_batch=True)`, then onnxruntime against torch on
other batches. The peer is torch itself. A model whose own code makes the batch a constant is listed with torch.export's word for
it. Each model runs in a process of its own; ``--out`` gets one JSON file a model, and dynamic_batch.json and .md.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.coverage import choose_names
from benchmarks.sweep import prepare_path, result_path, sweep, write_json, write_text


def main(
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("dynamic-batch-results"),
    only: Annotated[list[str] | None, typer.Option(help="Globs of library or library/name.")] = None,
    jobs: Annotated[int, typer.Option(help="Models side by side.")] = 2,
    again: Annotated[str, typer.Option(help="Which finished models to run once more: none, failed or all.")] = "none",
    timeout: Annotated[int, typer.Option(help="Seconds for one model.")] = 900,
) -> None:
    """Run the sweep and write its tables."""
    chosen = choose_names(only)
    pending = [name for name in chosen if _runs_again(result_path(out, name), again)]
    preload = ("benchmarks.dynamic_batch_checks",)
    sweep(pending, run_one, out, preload=preload, jobs=jobs, timeout=timeout, line=_line, lost=_lost)
    results = [json.loads(path.read_text()) for path in sorted(out.glob("models/*/*.json"))]
    write_json(out / "dynamic_batch.json", results)
    write_text(out / "dynamic_batch.md", page(results))
    print(f"{len(pending)} models run, {len(chosen) - len(pending)} were there already")
    failed = [f"{result['library']}/{result['name']}" for result in results if result["outcome"] == "failed"]
    print(f"the claim does not hold: {', '.join(failed)}" if failed else "the claim holds")
    sys.exit(bool(failed))


def run_one(name: str, path: str) -> None:
    """Check one model and write the result; the process's own entry point."""
    import torch

    from benchmarks.dynamic_batch_checks import check
    from benchmarks.zoo import find

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    write_json(Path(path), check(find(name)))


def page(results: Sequence[dict[str, Any]]) -> str:
    """The Markdown page: how many of each outcome, the reasons, and every model's size and errors."""
    from benchmarks.coverage_table import machine, table
    from benchmarks.dynamic_batch_checks import BATCHES, EXPORTED, OUTCOMES

    libraries = sorted({result["library"] for result in results})
    totals = [
        [outcome, *(str(_count(results, outcome, library)) for library in libraries), str(_count(results, outcome))]
        for outcome in OUTCOMES
    ]
    reasons = [
        [f"{result['library']}/{result['name']}", result["outcome"], result["detail"][:300]]
        for result in results
        if result["outcome"] != EXPORTED
    ]
    rows = [
        [
            f"{result['library']}/{result['name']}",
            result["outcome"],
            f"{result['bytes'] / 1e6:.1f} MB" if "bytes" in result else "",
            str(result.get("sparse", "")),
            *(f"{result['errors'][str(batch)]:.1e}" if "errors" in result else "" for batch in BATCHES),
            f"{result.get('seconds', 0):.0f} s",
        ]
        for result in results
    ]
    lines = ["# ONNX files with a free batch", "", ", ".join(f"{name} {text}" for name, text in machine().items()), ""]
    lines += [*table(["outcome", *libraries, "all"], totals), "", "## Not exported with a free batch, and why", ""]
    lines += table(["model", "outcome", "reason"], reasons) if reasons else ["None."]
    header = ["model", "outcome", "size", "2:4 weights", *(f"error at {batch}" for batch in BATCHES), "time"]
    return "\n".join([*lines, "", "## Every model", "", *table(header, rows)]) + "\n"


def _count(results: Sequence[dict[str, Any]], outcome: str, library: str | None = None) -> int:
    return sum(result["outcome"] == outcome and library in (None, result["library"]) for result in results)


def _runs_again(path: Path, again: str) -> bool:
    if again == "all" or not path.exists():
        return True
    return again == "failed" and json.loads(path.read_text())["outcome"] == "failed"


def _lost(name: str, why: str) -> dict[str, Any]:
    from benchmarks.zoo import find

    case = find(name)
    return {"library": case.library, "name": case.name, "family": case.family, "outcome": "failed", "detail": why}


def _line(result: dict[str, Any]) -> str:
    size = result.get("peak_bytes", 0) / 2**30
    told = "" if result["outcome"] == "exported" else f": {result['detail'][:200]}"
    return f"{result['library']}/{result['name']} {result.get('seconds', 0):.0f} s {size:.1f} GiB {result['outcome']}{told}"


if __name__ == "__main__":
    prepare_path()
    typer.run(main)
