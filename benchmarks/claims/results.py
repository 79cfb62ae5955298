"""Runs tasks side by side, keeps each result in a file of its own, and never makes a run twice."""

from __future__ import annotations

import json
import multiprocessing
import platform
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.claims.task import Task
from benchmarks.sweep import write_json


class Results:
    """The folder that results stand in, one file a task.

    Args:
        folder: of the results; made when the first is written.
        data: folder with data sets, or None.
        device: to train on.
        workers: runs side by side, each on one thread.
    """

    def __init__(self, folder: Path, *, data: Path | None = None, device: str = "cpu", workers: int = 1) -> None:
        self.folder, self.data, self.device, self.workers = folder, data, device, workers

    def path(self, task: Task) -> Path:
        return self.folder / "runs" / f"{task.key}.json"

    def missing(self, tasks: Iterable[Task]) -> list[Task]:
        """Tasks without a result, each once, in the order given."""
        return [task for task in dict.fromkeys(tasks) if not self.path(task).exists()]

    def run(self, tasks: Iterable[Task]) -> None:
        """Make the runs that are missing; what is done stays when this is interrupted."""
        missing = self.missing(tasks)
        if not missing:
            return
        console = Console(stderr=True)
        columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("runs", total=len(missing))
            if self.workers == 1:
                for task in missing:
                    _make(task, str(self.path(task)), self.data, self.device)
                    progress.advance(bar)
                return
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(self.workers, mp_context=context) as pool:
                futures = [pool.submit(_make, task, str(self.path(task)), self.data, self.device) for task in missing]
                try:
                    for future in as_completed(futures):
                        future.result()
                        progress.advance(bar)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def get(self, task: Task) -> dict[str, Any]:
        """What a run measured."""
        found: dict[str, Any] = json.loads(self.path(task).read_text())["result"]
        return found

    def made_with(self, tasks: Iterable[Task]) -> list[str]:
        """On what the results were made, each once."""
        return sorted({json.loads(self.path(task).read_text()).get("made_with", "unknown") for task in tasks})

    def values(self, tasks: Sequence[Task], name: str = "error") -> list[float]:
        """One figure a seed, in the order of the tasks."""
        return [float(self.get(task)[name]) for task in tasks]


def _make(task: Task, path: str, data: Path | None, device: str) -> None:
    import torch

    import sparsefx
    from benchmarks.claims.trainer import train

    if Path(path).exists():  # made meanwhile, for another claim
        return
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    made_with = f"{device} ({name}), one thread a run, torch {torch.__version__}, sparsefx {sparsefx.__version__}"
    write_json(Path(path), {"task": asdict(task), "made_with": made_with, "result": train(task, data, device)})
