"""Claim: sparsify, audit, their printing and the Program's are linear in the number of layers, up to 10 000.

python benchmarks/scaling.py

A chain of residual blocks, 1 250 to 10 000 Linear layers. Printed: seconds of processor time, and the growth from each size to
the next (2 is linear). torch.export alone stands beside what is built on it, which --inputs measures too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import sparsefx
from benchmarks.coverage_table import machine

SIZES = (1250, 2500, 5000, 10_000)
WIDTH = 16


class Block(nn.Module):
    """One Linear layer and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).relu()


def model_of(layers: int) -> nn.Module:
    """``layers`` residual blocks in a chain, in ten stages."""
    return nn.Sequential(*(nn.Sequential(*(Block() for _ in range(layers // 10))) for _ in range(10)))


def measure(layers: int, repeats: int, inputs: bool) -> dict[str, float]:
    """Median processor seconds of each step, for one size."""
    runs = [_measure_once(model_of(layers), inputs) for _ in range(repeats)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _measure_once(model: nn.Module, inputs: bool) -> dict[str, float]:
    found: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = run()
        found[name] = time.process_time() - start
        return result

    example = torch.randn(2, WIDTH)
    timed("audit, dense, no inputs", lambda: sparsefx.audit(model))
    timed("sparsify, no inputs", lambda: sparsefx.sparsify(model))
    if inputs:
        sparsefx.finalize(model)
        timed("torch.export alone", lambda: torch.export.export(model, (example,), strict=False))
        timed("sparsify, with inputs", lambda: sparsefx.sparsify(model, example_inputs=example))
    audit = timed("audit", lambda: sparsefx.audit(model))
    timed("audit as text", lambda: str(audit))
    timed("audit as JSON", audit.to_json)
    graph = timed("graph", lambda: sparsefx.graph(model))
    timed("graph as text", lambda: str(graph.graph))
    timed("finalize", lambda: sparsefx.finalize(model))
    return found


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--inputs", action="store_true", help="also with example inputs, through torch.export")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options = parser.parse_args()
    sys.setrecursionlimit(10_000)
    print(machine(), f"threads {torch.get_num_threads()}")
    results = {size: measure(size, options.repeats, options.inputs) for size in options.sizes}
    first = next(iter(results.values()))
    print(f"{'seconds at':26}" + "".join(f"{size:>10}" for size in results) + "   growth per doubling")
    for name in first:
        seconds = [result[name] for result in results.values()]
        growth = [later / earlier for earlier, later in pairwise(seconds)]
        print(f"{name:26}" + "".join(f"{value:10.2f}" for value in seconds) + "   " + " ".join(f"{g:.2f}" for g in growth))


if __name__ == "__main__":
    main()
