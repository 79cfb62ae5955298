"""Claim: choosing masks costs little more than touching the weights, on the CPU.

25 M float32 weights, the convolutions of a ResNet-50 and one large matrix, as ratios to one ``copy_`` of them into place in the
same run: 2:4 along one axis at most 3, exact 2:4 along both at most 10, the exact top half of each layer at most 5. Timings of
all operations are interleaved; the figures are ratios of medians.

    python benchmarks/mask_update.py [--weights 25] [--threads 2] [--repeats 7] [--no-torch] [--scale] [--billion]

``--scale`` repeats the compiled kernels for 1, 10 and 100 M weights; ``--billion`` adds 1000 M (about 14 GB of memory).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsefx.dormant_values import compact_of
from sparsefx.ops import native
from sparsefx.ops.split import merge, rewire_masks, split
from sparsefx.patterns import parse
from sparsefx.sparse_parameter import SparseParameter

BARS = {"2:4": 3.0, "2:4-transposable": 10.0, "unstructured": 5.0, "unstructured:global": 5.0}
BARRED = ("mask", "mask, no hint")


def shapes_of(millions: float) -> list[tuple[int, ...]]:
    """Convolutions of a ResNet-50 (strided ones left out) while they fit, and one matrix for the rest."""
    shapes: list[tuple[int, ...]] = []
    left = int(millions * 1e6)
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(blocks):
            for shape in ((width, 4 * width, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                size = torch.Size(shape).numel()
                if size <= left // 4:
                    shapes.append(shape)
                    left -= size
    columns = 4096 if left >= 1 << 24 else 512
    return [*shapes, (left // columns // 4 * 4, columns)]


def parameters(millions: float, pattern: str, seed: int) -> tuple[list[Tensor], list[SparseParameter]]:
    generator = torch.Generator().manual_seed(seed)
    chosen = parse(pattern)
    weights = [torch.randn(shape, generator=generator) for shape in shapes_of(millions)]
    empty = [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    return weights, [
        SparseParameter(chosen, 0.5, 1, mask, compact_of(weight, mask)) for weight, mask in zip(weights, empty, strict=True)
    ]


def interleaved(operations: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each operation; a first round, which is not counted, faults the memory in."""
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(repeats + 1):
        for name, operation in operations.items():
            started = time.perf_counter()
            operation()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def measure(weights: Sequence[Tensor], records: Sequence[SparseParameter], repeats: int, *, compiled: bool) -> dict[str, float]:
    """Seconds of copy and of all operations of one pattern. The weights are as before afterwards."""
    places = [torch.empty_like(weight) for weight in weights]

    def copy() -> None:
        for weight, place in zip(weights, places, strict=True):
            place.copy_(weight)

    def without_hint() -> None:
        for record in records:
            record.threshold = None
        rewire_masks(weights, records, compiled=compiled)

    operations: dict[str, Callable[[], None]] = {"copy": copy}
    if compiled and records[0].pattern.name.startswith("unstructured"):
        operations["mask, no hint"] = without_hint
    operations["mask"] = lambda: rewire_masks(weights, records, compiled=compiled)
    operations["split"] = lambda: bool(split(weights, records, compiled=compiled)) and None
    operations["merge"] = lambda: merge(weights, records, compiled=compiled)
    return interleaved(operations, repeats)


def run(millions: float, patterns: Sequence[str], repeats: int, seed: int, means: Sequence[str], *, barred: bool = True) -> bool:
    """Print one table. Whether every bar was met by the compiled kernels (or by torch, where there are none)."""
    met = True
    for pattern in patterns:
        for mean in means:
            weights, records = parameters(millions, pattern, seed)
            compiled = mean == "compiled"
            seconds = measure(weights, records, repeats if compiled else min(repeats, 2), compiled=compiled)
            copy = seconds.pop("copy")
            total = sum(weight.numel() for weight in weights) / 1e6
            for operation, value in seconds.items():
                bar = BARS.get(pattern) if barred and operation in BARRED else None
                passed = bar is None or value / copy <= bar
                verdict = "" if bar is None else f"bar {bar:g}: {'met' if passed else 'NOT met'}"
                print(
                    f"{total:8.1f} M  {pattern:22s}{mean:10s}{operation:15s}{value * 1e3:10.2f} ms"
                    f"{value / copy:9.2f} x copy ({copy * 1e3:.2f} ms)  {verdict}",
                    flush=True,
                )
                met = met and (passed or (mean == "torch" and "compiled" in means))
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, default=25.0, help="in millions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--patterns", nargs="+", default=["2:4", "2:4-transposable", "unstructured", "unstructured:global", "4:8"]
    )
    parser.add_argument("--no-torch", action="store_true", help="leave out the fallback in plain torch, which is slow")
    parser.add_argument("--scale", action="store_true", help="also 1, 10 and 100 M weights, compiled kernels only")
    parser.add_argument("--billion", action="store_true", help="also 1000 M weights")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"device: CPU, {platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
    print(
        f"versions: python {platform.python_version()}, torch {torch.__version__}; threads {options.threads}, seed {options.seed}"
    )
    print(f"means: {native.describe()}; load average {os.getloadavg()[0]:.1f}")
    fast = ["compiled"] if native.available() else []
    means = fast if fast and options.no_torch else [*fast, "torch"]
    met = run(options.weights, options.patterns, options.repeats, options.seed, means)
    sizes = ([1.0, 10.0, 100.0] if options.scale else []) + ([1000.0] if options.billion else [])
    for millions in sizes:
        repeats = options.repeats if millions < 1000 else 2
        # Without bars: a million weights stay in the caches, where a copy is cheaper than at any other size.
        run(millions, options.patterns, repeats, options.seed, fast or ["torch"], barred=False)
    print("all bars met" if met else "NOT all bars met")
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    main()
