"""Claim: a long run neither grows nor slows down, and its counts stay exact.

20 000 optimizer steps of a small net, masks chosen anew after every one, by methods of every kind, beside the dense run of the
same net. After every step the number of participating weights is compared with the density asked for, in all weights together
and, for N:M patterns, in every group; weights outside their masks must be zero. Memory is the process' resident set, bytes of
live tensors and the number of Python objects, at tenths of the run; speed is the median step of each tenth, in processor time
of its one thread, since other processes may want the cores too.

    python benchmarks/soak.py [--steps 20000] [--method NAME]
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.ops import native
from sparsefx.sparse_parameter import sparse_parameters

METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("dense", "", {}),
    ("magnitude", "2:4", {"exploit": "reset", "reset_every": 50}),
    ("magnitude", "2:4", {"exploit": "none"}),
    ("magnitude", "2:4-transposable", {"exploit": "none"}),
    ("magnitude", "unstructured:global", {"exploit": "regularize"}),
    ("set", "unstructured", {"rewire_every": 1}),
    ("sparse-momentum", "unstructured", {"rewire_every": 1}),
    ("rigl", "2:4", {"rewire_every": 2}),
    ("deep-r", "unstructured", {}),
)
# Growth that is less than this is what an allocator keeps back, once.
MEMORY_BAR = 1 << 21
SPEED_BAR = 1.1


@dataclass
class Findings:
    """What was seen of one run; lists have an entry a tenth."""

    name: str
    wrong_counts: int = 0
    leaks: int = 0
    moved: int = 0
    resident: list[int] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def growth(self) -> int:
        """Bytes of resident memory gained since the end of the first tenth."""
        return self.resident[-1] - self.resident[0]

    @property
    def slowdown(self) -> float:
        """The median of the last three tenths over that of the first three."""
        return statistics.median(self.seconds[-3:]) / statistics.median(self.seconds[:3])

    @property
    def holds(self) -> bool:
        """Counts exact, no more tensors than before, resident memory flat. Speed is printed, and is the machine's too."""
        return not self.wrong_counts and not self.leaks and self.tensors[-1] <= self.tensors[0] and self.growth < MEMORY_BAR


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _live_bytes() -> int:
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):  # isinstance would ask odd objects for their class
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _check(model: nn.Module, wanted: int, before: dict[str, Tensor], found: Findings) -> None:
    total, moved, exact = 0, False, True
    for name, parameter, record in sparse_parameters(model):
        mask = record.mask
        total += int(mask.sum())
        if record.pattern.name.startswith("2:4"):
            exact &= bool((mask.view(-1, 4).sum(1) == 2).all())
            if "transposable" in record.pattern.name:
                exact &= bool((mask.t().reshape(-1, 4).sum(1) == 2).all())
        found.leaks += bool((parameter.detach().masked_fill(mask, 0) != 0).any())
        moved |= not torch.equal(mask, before[name])
        before[name].copy_(mask)
    found.wrong_counts += total != wanted or not exact
    found.moved += moved


def soak(algorithm: str, pattern: str, options: dict[str, Any], steps: int, looks: int = 10) -> Findings:
    """Train for ``steps`` steps on noisy targets, whose gradients keep masks moving; memory is looked at ``looks`` times."""
    model, found = _net(), Findings(" ".join(filter(None, (algorithm, pattern, options.get("exploit", "")))))
    data = torch.Generator().manual_seed(1)
    wanted = 0
    before: dict[str, Tensor] = {}
    if pattern:
        sparsefx.sparsify(model, pattern=pattern, algorithm=algorithm)
        before = sparsefx.masks(model)
        wanted = sum(mask.numel() for mask in before.values()) // 2
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    if pattern:
        sparsefx.attach(model, optimizer, total_steps=steps, **options)
    between = max(1, steps // looks)
    seconds: list[float] = []
    for step in range(1, steps + 1):
        x = torch.randn(16, 32, generator=data)
        target = x[:, :16] + torch.randn(16, 16, generator=data)
        started = time.thread_time()
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        seconds.append(time.thread_time() - started)
        if pattern:
            _check(model, wanted, before, found)
        if step % between == 0:
            found.seconds.append(statistics.median(seconds))
            seconds.clear()
            gc.collect()
            found.tensors.append(_live_bytes())
            found.objects.append(len(gc.get_objects()))
            found.resident.append(_resident())  # last: counting takes memory, the first time
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--method", choices=sorted({name for name, _, _ in METHODS}))
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, CPU, 1 thread, seed 0, mask kernels: {native.describe()}")
    print(f"{given.steps} steps each; wrong counts, leaks and moves are numbers of steps")
    held = True
    for algorithm, pattern, options in METHODS:
        if given.method not in (None, algorithm):
            continue
        found = soak(algorithm, pattern, options, given.steps)
        held &= found.holds
        first, last = 1e6 * found.seconds[0], 1e6 * found.seconds[-1]
        print(
            f"{found.name:42} wrong {found.wrong_counts}, leaks {found.leaks}, masks moved {found.moved}; "
            f"resident {found.growth / 1024:+.0f} KiB, tensors {found.tensors[-1] - found.tensors[0]:+d} bytes, "
            f"objects {found.objects[-1] - found.objects[0]:+d}; step {first:.0f} us at first, {last:.0f} us at last, "
            f"ratio {found.slowdown:.3f} (bar {SPEED_BAR}: {'met' if found.slowdown <= SPEED_BAR else 'not met'})",
            flush=True,
        )
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
