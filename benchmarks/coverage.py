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
import multiprocessing
import os
import time
import warnings
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PRELOADED = ["torchvision", "timm", "transformers", "sparsefx", "onnxruntime", "onnxscript", "benchmarks.coverage_checks"]


def main(
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("coverage-results"),
    only: Annotated[list[str] | None, typer.Option(help="Globs of library or library/name.")] = None,
    jobs: Annotated[int, typer.Option(help="Models side by side.")] = 2,
    shard: Annotated[str, typer.Option(help="k/n: the k-th of n equal parts.")] = "1/1",
    again: Annotated[str, typer.Option(help="Which finished models to run once more: none, failed or all.")] = "none",
    timeout: Annotated[int, typer.Option(help="Seconds for one model.")] = 1200,
    draw: Annotated[
        int | None, typer.Option(help="Instead of the list: 20 of timm and 10 of transformers, by this seed.")
    ] = None,
    names: Annotated[bool, typer.Option("--list", help="Print the names of the models and stop.")] = False,
) -> None:
    """Run the sweep and write its tables."""
    from benchmarks.coverage_table import write_tables
    from benchmarks.zoo import LIBRARIES, cases

    if draw is None:
        chosen = [case.full_name for library in LIBRARIES for case in cases(library) if _wanted(case.full_name, only)]
    else:
        from benchmarks.zoo.drawn_models import draw_names

        chosen = draw_names(draw)
    part, parts = (int(number) for number in shard.split("/"))
    chosen = chosen[part - 1 :: parts]
    if names:
        print("\n".join(chosen))
        return
    pending = [name for name in chosen if _runs_again(_path(out, name), again)]
    done = _sweep(pending, out, jobs, timeout)
    print(f"{done} models run, {len(chosen) - len(pending)} were there already")
    write_tables(out)


def _wanted(name: str, globs: list[str] | None) -> bool:
    return not globs or any(fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}/") for pattern in globs)


def _path(out: Path, name: str) -> Path:
    return out / "models" / f"{name}.json"


def _runs_again(path: Path, again: str) -> bool:
    if again == "all" or not path.exists():
        return True
    return again == "failed" and not all(step["ok"] for step in json.loads(path.read_text())["steps"].values())


@dataclass
class _Job:
    name: str
    process: BaseProcess
    started: float


def _sweep(pending: list[str], out: Path, jobs: int, timeout: int) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # imports once, not once a model
    running: list[_Job] = []
    waiting = list(reversed(pending))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("coverage", total=len(pending))
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                process = context.Process(target=run_one, args=(name, str(_path(out, name))))
                process.start()
                running.append(_Job(name, process, time.monotonic()))
            for job in list(running):
                late = time.monotonic() - job.started > timeout
                if job.process.is_alive() and not late:
                    continue
                job.process.kill()
                job.process.join()
                running.remove(job)
                progress.advance(task)
                path = _path(out, job.name)
                if late or job.process.exitcode != 0:
                    why = f"ran past {timeout} s" if late else f"the process ended with {job.process.exitcode}"
                    _write(path, {**_identity(job.name), "steps": {"sparsify": {"ok": False, "detail": why, "seconds": 0}}})
                progress.console.print(_line(json.loads(path.read_text())))
            time.sleep(0.05)
    return len(pending)


def run_one(name: str, path: str) -> None:
    """Cover one model and write the result; the process's own entry point."""
    import torch

    from benchmarks.coverage_checks import cover
    from benchmarks.zoo import find

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    _write(Path(path), cover(find(name)))


def _identity(name: str) -> dict[str, Any]:
    from benchmarks.zoo import find

    case = find(name)
    return {"library": case.library, "name": case.name, "family": case.family}


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(path)


def _line(result: dict[str, Any]) -> str:
    failed = {name: step["detail"] for name, step in result["steps"].items() if not step["ok"]}
    told = "; ".join(f"{name}: {detail[:150]}" for name, detail in failed.items())
    size = result.get("peak_bytes", 0) / 2**30
    return f"{result['library']}/{result['name']} {result.get('seconds', 0):.0f} s {size:.1f} GiB {told or 'ok'}"


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
