"""Training methods beside each other on CIFAR-10, one table: the dense net, SMALL (a dense net as narrow as the sparse ones
are small), static random masks, SET, RigL, sparse momentum, magnitude rewiring, the lottery ticket, gradual magnitude pruning
and SNIP at four densities, and 2:4 masks along one axis and along both. Test error, mean and standard error over seeds.

All methods of a seed have the same first weights, batches and learning rates: SGD with Nesterov momentum 0.9, weight decay
5e-4, batches of 128, one cycle up to 0.1. The test images are the last 5 000 of the 50 000 to train on, which no net sees.
What a method is not told here is its own default. All layers have the same density but where a method shares weights out among
them (SNIP from the start, sparse momentum as it goes); the first convolution and norms stay dense.

``gpu``: a ResNet-14 of width 16, 32 and 64, 60 epochs. ``cpu`` is what two cores can do in about an hour, and departs from it:
one block a stage behind a first convolution of stride 2 (78 thousand parameters), 4 epochs, and, since that is few steps,
methods that change masks once an epoch or every 100 steps do so forty times a run (`claims.trainer.interval`). So its errors are
far from published ones, and only what stands beside it in the table compares. ``smoke`` takes the shipped digits.

    python -m benchmarks.cifar10_methods --scale smoke|cpu|gpu --data FOLDER [--workers 2] [--only set rigl] [--out FOLDER]

Each run is kept in a file of its own: an interrupted call goes on where it was, seed by seed, and ``--table`` prints what is
there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.claims.results import Results
from benchmarks.claims.task import Task
from benchmarks.sweep import write_text
from sparsefx.analysis import estimate

DENSITIES = (0.5, 0.25, 0.1, 0.05)
METHODS = ("small", "static-random", "set", "rigl", "sparse-momentum", "magnitude", "lottery", "gradual", "snip")
PATTERNS = ("2:4", "2:4-transposable")
NAMES = {
    "small": "SMALL",
    "static-random": "static random masks",
    "magnitude": "magnitude rewiring",
    "lottery": "lottery ticket",
    "gradual": "gradual pruning",
}
Row = tuple[str, str]
"""Method and pattern."""


@dataclass(frozen=True)
class Size:
    """How large the experiment is: data set, net and epochs of a run, and seeds."""

    data: str
    net: str
    epochs: int
    seeds: int


SIZES = {
    "smoke": Size("digits", "conv", 2, 2),
    "cpu": Size("cifar10", "resnet8", 4, 3),
    "gpu": Size("cifar10", "resnet", 60, 3),
}


def tasks(size: Size, only: Sequence[str] = ()) -> dict[tuple[Row, float], list[Task]]:
    """The runs of each cell of the table, one a seed. ``only`` names methods; the dense net is always there."""
    cells = {(("dense", "unstructured"), 1.0)}
    cells |= {((method, "unstructured"), density) for method in METHODS for density in DENSITIES}
    cells |= {(("magnitude", pattern), 0.5) for pattern in PATTERNS}
    order = ["dense", *METHODS]
    chosen = [cell for cell in cells if not only or cell[0][0] in (*only, "dense")]
    chosen.sort(key=lambda cell: (cell[0][1] != "unstructured", cell[0][1], order.index(cell[0][0]), -cell[1]))
    return {cell: [_task(size, *cell, seed) for seed in range(size.seeds)] for cell in chosen}


def _task(size: Size, row: Row, density: float, seed: int) -> Task:
    return Task(size.data, size.net, row[0], density, row[1], (), size.epochs, seed)


def table(cells: Mapping[tuple[Row, float], Sequence[Task]], results: Results) -> str:
    """Markdown: a row a method, a column a density; cells without a run hold a dash, and those without all seeds say how many."""
    lines = ["| test error, % | " + " | ".join(f"d = {density:g}" for density in DENSITIES) + " |"]
    lines.append("|---|" + "---|" * len(DENSITIES))
    rows = list(dict.fromkeys(row for row, _ in cells))
    for row in rows:
        method, pattern = row
        name = NAMES.get(method, method)
        columns = [1.0] if method == "dense" else list(DENSITIES)
        told = [_cell(cells.get((row, density), ()), results) for density in columns]
        told += [""] * (len(DENSITIES) - len(told))
        lines.append(f"| {name if pattern == 'unstructured' else f'{name}, {pattern}'} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def _cell(group: Sequence[Task], results: Results) -> str:
    made = [task for task in group if results.path(task).exists()]
    if not made:
        return "-" if group else ""
    found = estimate(results.values(made))
    told = f"{found.mean:.2f} ± {found.standard_error:.2f}" if found.count > 1 else f"{found.mean:.2f}"
    return told if len(made) == len(group) else f"{told} ({len(made)} of {len(group)} seeds)"


def counts(cells: Mapping[tuple[Row, float], Sequence[Task]], results: Results) -> str:
    """Parameters that take part, by density: of the dense net, of SMALL and of a sparse net."""
    told = []
    for method in ("dense", "small", "magnitude"):
        for density in (1.0, *DENSITIES):
            group = cells.get(((method, "unstructured"), density), ())
            made = [task for task in group if results.path(task).exists()]
            if made:
                told.append(f"{NAMES.get(method, method)} {density:g}: {int(results.get(made[0])['weights']):,}")
    return "parameters that take part: " + "; ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=tuple(SIZES), default="smoke")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10; not needed for smoke")
    parser.add_argument("--out", type=Path, default=Path("cifar10-methods"), help="folder of results and of the table")
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1), help="runs side by side, one thread each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", default=[], choices=METHODS, help="methods to run beside the dense net")
    parser.add_argument("--table", action="store_true", help="run nothing: print the table of what is there")
    arguments = parser.parse_args()
    size = SIZES[arguments.scale]
    cells = tasks(size, arguments.only)
    results = Results(arguments.out / arguments.scale, data=arguments.data, device=arguments.device, workers=arguments.workers)
    by_seed = sorted((task for group in cells.values() for task in group), key=lambda task: task.seed)
    told = f"{size.data}, net {size.net}, {size.epochs} epochs, seeds 0 to {size.seeds - 1}"
    print(f"{told}; {len(by_seed)} runs, {len(results.missing(by_seed))} of them to make", flush=True)
    started = time.perf_counter()
    if not arguments.table:
        results.run(by_seed)
    told = "; ".join([told, *results.made_with(task for task in by_seed if results.path(task).exists())])
    text = f"{table(cells, results)}\n\n{counts(cells, results)}\n"
    print(f"\n{told}\n\n{text}\n{time.perf_counter() - started:.0f} s")
    write_text(arguments.out / f"table-{arguments.scale}.md", f"{told}\n\n{text}")


if __name__ == "__main__":
    main()
