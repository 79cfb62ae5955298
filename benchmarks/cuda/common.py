"""What the GPU benchmarks share: the options, the line that says what ran where, clocks, and a table of ratios."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import sparsefx
from sparsefx.ops.semi_structured_product import ProductKernel, Reference, kernels_of_device, why_no_kernels
from sparsefx.ops.timing import Operation, Timer, cuda_seconds


@dataclass(frozen=True)
class Setting:
    """Where a benchmark runs.

    Attributes:
        device: ``cuda``, or ``cpu`` in a dry run.
        dtypes: to run in.
        kernels: sparse kernels; the reference in a dry run.
        timer: of GPU work, or of wall time in a dry run.
        chooser: the timer by which layers are chosen; in a dry run, one that lets sparse kernels win.
        dry: whether this only shows that the program runs: tiny sizes on the CPU, whose ratios mean nothing.
        seed: of all random numbers.
        options: the parsed command line.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    kernels: tuple[ProductKernel, ...]
    timer: Timer
    chooser: Timer
    dry: bool
    seed: int
    options: argparse.Namespace

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Normal numbers, the same in every run."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(*shape, generator=generator).to(self.device, dtype)


def start(description: str | None, parser: argparse.ArgumentParser | None = None) -> Setting:
    """Parse the command line and print device, versions and seed; ends the program where there is no GPU to measure on."""
    parser = parser or argparse.ArgumentParser()
    parser.description, parser.formatter_class = description, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes on the CPU, to see that the program runs; times mean nothing"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "both"), default="both")
    options = parser.parse_args()
    names = ("bfloat16", "float16") if options.dtype == "both" else (options.dtype,)
    problem = "" if options.dry else why_no_kernels()
    if problem:
        raise SystemExit(f"nothing was measured: {problem} (--dry runs this program at tiny sizes on the CPU)")
    torch.manual_seed(options.seed)
    if options.dry:
        device = f"CPU, {platform.machine()}, DRY RUN: no ratio below means anything"
    else:
        major, minor = torch.cuda.get_device_capability()
        device = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"
    kernels: tuple[ProductKernel, ...] = (Reference(),) if options.dry else kernels_of_device()
    print(f"device: {device}")
    print(f"versions: python {platform.python_version()}, torch {torch.__version__}, sparsefx {sparsefx.__version__}; "
          f"cuSPARSELt {torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else 'none'}; "
          f"seed {options.seed}; kernels {', '.join(kernel.name for kernel in kernels)}", flush=True)  # fmt: skip
    return Setting(
        device="cpu" if options.dry else "cuda",
        dtypes=tuple(getattr(torch, name) for name in names),
        kernels=kernels,
        timer=wall_seconds if options.dry else cuda_seconds,
        chooser=sparse_first if options.dry else cuda_seconds,
        dry=options.dry,
        seed=options.seed,
        options=options,
    )


def sparse_first(operations: Sequence[Operation]) -> list[float]:
    """Runs everything and lets the sparse kernels win, so that a dry run goes through them."""
    for operation in operations:
        operation()
    return [2.0, *(1.0 for _ in operations[1:])]


def wall_seconds(operations: Sequence[Operation]) -> list[float]:
    """The median of three runs of each operation, in turns."""
    seconds: list[list[float]] = [[] for _ in operations]
    for _ in range(3):
        for operation, times in zip(operations, seconds, strict=True):
            started = time.perf_counter()
            operation()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]


def interleaved_steps(steps: Sequence[Operation], rounds: int, device: str) -> list[float]:
    """Median seconds of whole steps as a user runs them, launches included, in turns; three rounds are not counted."""
    seconds: list[list[float]] = [[] for _ in steps]
    for round_number in range(rounds + 3):
        for step, times in zip(steps, seconds, strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_number >= 3:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]


def verdict(ratio: float, bar: float | None, setting: Setting) -> str:
    """The ratio beside its bar."""
    if setting.dry:
        return f"{ratio:6.2f}x (dry)"
    return f"{ratio:6.2f}x" if bar is None else f"{ratio:6.2f}x   bar {bar}: {'met' if ratio >= bar else 'NOT met'}"
