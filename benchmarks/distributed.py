"""Claim: under DistributedDataParallel all ranks have the same masks at every step, and the weights and masks of one process that
trains on the joined batch. A run saved on some ranks goes on with any number of them.

    torchrun --nproc-per-node 2 benchmarks/distributed.py
    torchrun --nproc-per-node 2 benchmarks/distributed.py --save FILE
    torchrun --nproc-per-node 4 benchmarks/distributed.py --resume FILE

Processes meet over gloo, on the CPU, in float64: the gradients of a joined batch and the mean of its parts' differ by rounding
only, which is far from deciding a mask. Masks have to be equal, weights to 1e-9 of the largest.
"""

from __future__ import annotations

import argparse
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparsefx

METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("magnitude", "2:4", {"exploit": "none"}),
    ("magnitude", "2:4-transposable", {"reset_every": 7}),
    ("magnitude", "unstructured", {"exploit": "none"}),
    ("magnitude", "unstructured:global", {"exploit": "none"}),
    ("sparse-momentum", "unstructured", {"rewire_every": 5}),
    ("set", "2:4", {"rewire_every": 5}),
    ("set", "2:4-transposable", {"rewire_every": 5}),
    ("set", "unstructured", {"rewire_every": 5}),
    ("rigl", "2:4", {"rewire_every": 5}),
    ("rigl", "2:4-transposable", {"rewire_every": 5}),
    ("rigl", "unstructured", {"rewire_every": 5}),
)
TOLERANCE = 1e-9
BATCH = 16  # of all ranks together


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    model = nn.Sequential(*layers).double()
    model.register_buffer("calls", torch.zeros(1))  # something for broadcast_buffers to do
    return model


def batch(step: int) -> Tensor:
    return torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.sin()).square().mean()


class Training:
    """One run: a model, or a replica of it, that makes steps on its part of each batch."""

    def __init__(self, method: int, steps: int, *, seed: int, replica: dict[str, Any] | None) -> None:
        algorithm, pattern, options = METHODS[method]
        self.model = sparsefx.sparsify(net(seed), pattern=pattern, algorithm=algorithm)
        self.runs = self.model if replica is None else nn.parallel.DistributedDataParallel(self.model, **replica)
        self.part = slice(None) if replica is None else slice(dist.get_rank(), None, dist.get_world_size())
        self.optimizer = torch.optim.SGD(self.runs.parameters(), 0.2, momentum=0.9)
        generator = torch.Generator().manual_seed(seed)  # replicas are to take that of rank 0
        self.runtime = sparsefx.attach(self.runs, self.optimizer, total_steps=steps, generator=generator, **options)

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        loss_of(self.runs, batch(number)[self.part]).backward()
        self.optimizer.step()

    def masks(self) -> Tensor:
        """All masks in one row of bytes."""
        return torch.cat([mask.flatten() for mask in sparsefx.masks(self.model).values()]).to(torch.uint8)


def same_on_all_ranks(values: Tensor) -> bool:
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return all(torch.equal(part, parts[0]) for part in parts)


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between weights, as a share of the largest weight."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    largest = max(float(b.detach().abs().max()) for _, b in pairs)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs) / largest


def check(method: int, steps: int, replica: dict[str, Any], first: int = 0, path: str | None = None, save: bool = False) -> bool:
    """Run all ranks against one process; True where masks are equal at every step and weights within the tolerance."""
    rank = dist.get_rank()
    single = Training(method, steps, seed=0, replica=None)
    # Ranks start from different weights, masks and generators: DDP and attach have to make them one.
    joint = Training(method, steps, seed=rank, replica=replica)
    last = steps
    if path is not None and not save:
        for number in range(first):
            single.step(number)
        loaded = sparsefx.load(joint.runs, path, runtime=joint.runtime)
        joint.optimizer.load_state_dict(loaded.extra["optimizer"])
    elif save:
        last = steps // 2
    moved, equal, start = 0, True, joint.masks()
    for number in range(first, last):
        single.step(number)
        joint.step(number)
        masks = joint.masks()
        equal = equal and same_on_all_ranks(masks) and torch.equal(masks, single.masks())
        moved = max(moved, int((masks != start).sum()))
    off = distance(joint.model, single.model)
    if save and path is not None and rank == 0:
        sparsefx.save(joint.runs, path, runtime=joint.runtime, extra={"optimizer": joint.optimizer.state_dict()})
    held = equal and off <= TOLERANCE and moved > 0
    if rank == 0:
        algorithm, pattern, _ = METHODS[method]
        print(
            f"{algorithm:16} {pattern:20} {', '.join(f'{k}={v}' for k, v in replica.items()) or 'defaults':24} "
            f"masks equal: {equal}, moved {moved}, weights off by {off:.1e}: {'held' if held else 'FAILED'}"
        )
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--save", type=Path, help="train the first half and save to FILE.METHOD")
    parser.add_argument("--resume", type=Path, help="go on from FILE.METHOD")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    if dist.get_rank() == 0:
        print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, gloo, {dist.get_world_size()} processes")
    held = True
    for method in range(len(METHODS)):
        if given.save is not None:
            held = check(method, given.steps, {}, path=f"{given.save}.{method}", save=True) and held
        elif given.resume is not None:
            held = check(method, given.steps, {}, first=given.steps // 2, path=f"{given.resume}.{method}") and held
        else:
            held = check(method, given.steps, {}) and held
            held = check(method, given.steps, {"broadcast_buffers": False, "gradient_as_bucket_view": True}) and held
    dist.destroy_process_group()
    if not held:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
