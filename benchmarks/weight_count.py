"""Claim: no method ever gains or loses a weight: over 10 000 changes of masks the number that participates drifts by 0.

Every method that moves masks, on a small network with layers of very different sizes, one change of masks a step (as often as
the method can), each count compared with the count at the start. Methods whose density is a schedule (gradual) are held to the
schedule's end.

    python benchmarks/weight_count.py [--updates 10000] [--only sparse-momentum]
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import fields

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import sparsefx
from sparsefx.algorithms import ALGORITHMS, Algorithm, SparseMomentum
from sparsefx.ops import native
from sparsefx.patterns.selection import participating
from sparsefx.sparse_parameter import sparse_parameters

VARIANTS: tuple[tuple[str, Algorithm], ...] = (
    *((algorithm.name, algorithm) for algorithm in ALGORITHMS if algorithm.moves),
    ("sparse-momentum random", SparseMomentum(growth="random")),
    ("sparse-momentum neuron", SparseMomentum(growth="neuron")),
    ("sparse-momentum global", SparseMomentum(growth="global", drop="global")),
    ("sparse-momentum set", SparseMomentum(drop="set", redistribution="nonzero")),
    ("sparse-momentum magnitude", SparseMomentum(redistribution="magnitude", depth_ramp=0.2)),
)


def drift(algorithm: Algorithm, updates: int, console: Console, name: str) -> tuple[int, int, int, int]:
    """Weights at the start, largest distance of any count from that, changes of masks seen, weights that came or went in all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 16))
    fixed = algorithm.name == "accelerated"
    sparsefx.sparsify(
        model, pattern="4:8-transposable" if fixed else "unstructured", density=None if fixed else 0.2, algorithm=algorithm
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    # The drop fraction stays high to the end, so that every change is a large one.
    wanted = {"rewire_every": 1, "drop_schedule": "constant", "fix_after": 1.0, "exploit": "none"}
    has = {field.name for field in fields(algorithm)}
    options = {key: value for key, value in wanted.items() if key in has and (key != "fix_after" or "exploit" not in has)}
    sparsefx.attach(model, optimizer, total_steps=updates + 1, **options)
    records = [record for _, _, record in sparse_parameters(model)]
    generator = torch.Generator().manual_seed(1)
    start = sum(int(record.mask.sum()) for record in records)
    worst = changes = moved = 0
    before = [record.mask.clone() for record in records]
    for step in track(range(updates), description=name, console=console, transient=True, disable=not console.is_terminal):
        if algorithm.name == "gradual" and step == round(0.75 * updates):
            start = sum(participating(0.2, record.mask.numel()) for record in records)
        x = torch.randn(32, 16, generator=generator)
        optimizer.zero_grad()
        (model(x) - x.roll(step % 16, 1)).square().mean().backward()
        optimizer.step()
        count = sum(int(record.mask.sum()) for record in records)
        if algorithm.name != "gradual" or step > round(0.75 * updates):
            worst = max(worst, abs(count - start))
        differs = sum(int((record.mask != mask).sum()) for record, mask in zip(records, before, strict=True))
        changes, moved = changes + (differs > 0), moved + differs
        for record, mask in zip(records, before, strict=True):
            mask.copy_(record.mask)
    return start, worst, changes, moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    print(f"device cpu ({platform.processor() or platform.machine()}), torch {torch.__version__}, "
          f"sparsefx {sparsefx.__version__}, seed 0, {arguments.updates} updates each, {native.describe()}")  # fmt: skip
    held = True
    for name, algorithm in VARIANTS:
        if arguments.only and arguments.only != name:
            continue
        start, worst, changes, moved = drift(algorithm, arguments.updates, console, name)
        held = held and worst == 0
        print(f"  {name:28} {start:5} weights   drift {worst}   masks changed in {changes} steps, {moved} places", flush=True)
    print(f"drift of 0: {'held' if held else 'NOT HELD'}")


if __name__ == "__main__":
    main()
