"""Claim: untouched model code means all of it. Every model of the zoo is sparsified, trained, audited and exported.

    python benchmarks/coverage.py                      all of torchvision, timm's families, transformers, the shipped ones
    python benchmarks/coverage.py --only timm --jobs 2
    python benchmarks/coverage.py --shard 1/4          the first quarter, on one of four machines
    python benchmarks/coverage.py --again failed       once more what failed; finished models are not run twice otherwise
    python benchmarks/coverage.py --draw 1 --out drawn 20 of timm and 10 of transformers that are not in the list, by seed

Each model runs in a process of its own, with time and peak memory noted; each result is one JSON file under ``--out``, and all of
them together give coverage.json and coverage.md there.
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sweep import prepare_path, result_path, sweep, write_json


def main(
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("coverage-results"),
    only: Annotated[list[str] | None, typer.Option(help="Globs of library or library/name.")] = None,
    jobs: Annotated[int, typer.Option(help="Models side by side.")] = 2,
    shard: Annotated[str, typer.Option(help="k/n: the k-th of n equal parts.")] = "1/1",
    again: Annotated[str, typer.Option(help="Which finished models to run once more: none, failed or all.")] = "none",
    timeout: Annotated[int, typer.Option(help="Seconds for one model.")] = 1200,
    draw: Annotated[int | None, typer.Option(help="Instead of the list, 20 of timm and 10 of transformers by this seed.")] = None,
    names: Annotated[bool, typer.Option("--list", help="Print the names of the models and stop.")] = False,
) -> None:
    """Run the sweep and write its tables."""
    from benchmarks.coverage_table import write_tables

    chosen = choose_names(only, draw)
    part, parts = (int(number) for number in shard.split("/"))
    chosen = chosen[part - 1 :: parts]
    if names:
        print("\n".join(chosen))
        return
    pending = [name for name in chosen if _runs_again(result_path(out, name), again)]
    sweep(pending, run_one, out, preload=("benchmarks.coverage_checks",), jobs=jobs, timeout=timeout, line=_line, lost=_lost)
    print(f"{len(pending)} models run, {len(chosen) - len(pending)} were there already")
    write_tables(out)


def choose_names(only: list[str] | None, draw: int | None = None) -> list[str]:
    """``library/name`` of the models of the zoo that globs name, or of those that a seed draws."""
    if draw is not None:
        from benchmarks.zoo.drawn_models import draw_names

        return draw_names(draw)
    from benchmarks.zoo import LIBRARIES, cases

    return [case.full_name for library in LIBRARIES for case in cases(library) if _wanted(case.full_name, only)]


def _wanted(name: str, globs: list[str] | None) -> bool:
    return not globs or any(fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}/") for pattern in globs)


def _runs_again(path: Path, again: str) -> bool:
    if again == "all" or not path.exists():
        return True
    return again == "failed" and not all(step["ok"] for step in json.loads(path.read_text())["steps"].values())


def run_one(name: str, path: str) -> None:
    """Cover one model and write the result; the process's own entry point."""
    import torch

    from benchmarks.coverage_checks import cover
    from benchmarks.zoo import find

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    write_json(Path(path), cover(find(name)))


def _lost(name: str, why: str) -> dict[str, Any]:
    from benchmarks.zoo import find

    case = find(name)
    steps = {"sparsify": {"ok": False, "detail": why, "seconds": 0}}
    return {"library": case.library, "name": case.name, "family": case.family, "steps": steps}


def _line(result: dict[str, Any]) -> str:
    failed = {name: step["detail"] for name, step in result["steps"].items() if not step["ok"]}
    told = "; ".join(f"{name}: {detail[:150]}" for name, detail in failed.items())
    size = result.get("peak_bytes", 0) / 2**30
    return f"{result['library']}/{result['name']} {result.get('seconds', 0):.0f} s {size:.1f} GiB {told or 'ok'}"


if __name__ == "__main__":
    prepare_path()
    typer.run(main)
