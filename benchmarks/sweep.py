"""Runs something on many models, each in a process of its own, side by side, and goes on where it was stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PRELOADED = ("torchvision", "timm", "transformers", "sparsefx", "onnxruntime", "onnxscript")
Worker = Callable[[str, str], None]
"""Given the name of a case and a path, does the work and writes the result there, as JSON."""


@dataclass
class _Job:
    name: str
    process: BaseProcess
    started: float


def prepare_path() -> None:
    """Make the repository importable here and in the processes to come, with one thread each unless told otherwise."""
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def result_path(out: Path, name: str) -> Path:
    """Where the result of a model stands."""
    return out / "models" / f"{name}.json"


def sweep(
    names: Sequence[str],
    worker: Worker,
    out: Path,
    *,
    preload: Sequence[str] = (),
    jobs: int,
    timeout: int,
    line: Callable[[dict[str, Any]], str],
    lost: Callable[[str, str], dict[str, Any]],
) -> None:
    """Run ``worker`` on every name.

    Args:
        names: of the cases that have no result yet.
        worker: a function of a module, so that processes can find it.
        out: folder of results.
        preload: modules that the worker needs; imported once, not once a model.
        jobs: processes side by side.
        timeout: seconds for one model.
        line: one line for people, from a result.
        lost: the result of a model whose process ended without one, from its name and the reason.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *preload])
    running: list[_Job] = []
    waiting = list(reversed(names))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("models", total=len(names))
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                process = context.Process(target=worker, args=(name, str(result_path(out, name))))
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
                path = result_path(out, job.name)
                if late or job.process.exitcode != 0:
                    why = f"ran past {timeout} s" if late else f"the process ended with {job.process.exitcode}"
                    write_json(path, lost(job.name, why))
                progress.console.print(line(json.loads(path.read_text())), soft_wrap=True, highlight=False)
            time.sleep(0.05)


def write_json(path: Path, result: object) -> None:
    """Write all of it, or nothing."""
    write_text(path, json.dumps(result, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write all of it, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
