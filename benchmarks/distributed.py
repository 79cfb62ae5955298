"""Claim: under DistributedDataParallel and FSDP2 (`fully_shard`) all ranks have the same masks at every step, and the weights and
masks of one process that trains on the joined batch. A run saved on some ranks goes on with any number of them.

    torchrun --nproc-per-node 2 benchmarks/distributed.py
    torchrun --nproc-per-node 2 benchmarks/distributed.py --save FILE
    torchrun --nproc-per-node 4 benchmarks/distributed.py --resume FILE

``--kinds`` chooses among ``ddp``, ``ddp-bare`` (no broadcast of buffers, gradients as views of buckets) and ``fsdp``,
``--methods`` by position among the methods and patterns.
DDP saves one file with `sparsefx.save`; FSDP2 a folder with ``torch.distributed.checkpoint``, which cuts it anew for other ranks.

Processes meet over gloo, on the CPU, in float64: the gradients of a joined batch and the mean of its parts' differ by rounding
only, which is far from deciding a mask. Masks have to be equal, weights to 1e-9 of the largest.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

import sparsefx
from sparsefx.shards import shards_of, values_of

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
KINDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-bare": {"broadcast_buffers": False, "gradient_as_bucket_view": True},
    "fsdp": {},
}
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


def whole(value: Tensor) -> Tensor:
    """All of a tensor that processes share."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class Training:
    """One run: a model alone (``kind`` None), or wrapped, that makes steps on its part of each batch."""

    def __init__(self, method: int, steps: int, *, kind: str | None) -> None:
        algorithm, pattern, options = METHODS[method]
        rank = 0 if kind is None else dist.get_rank()
        # Replicas start from different weights, masks and generators: DDP and attach have to make them one. Shards need one seed.
        self.model = sparsefx.sparsify(net(0 if kind == "fsdp" else rank), pattern=pattern, algorithm=algorithm)
        self.runs: nn.Module = self.model
        if kind == "fsdp":
            for layer in self.model:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer)
            fully_shard(self.model)
        elif kind is not None:
            self.runs = nn.parallel.DistributedDataParallel(self.model, **KINDS[kind])
        self.part = slice(None) if kind is None else slice(rank, None, dist.get_world_size())
        self.optimizer = torch.optim.SGD(self.runs.parameters(), 0.2, momentum=0.9)
        generator = torch.Generator().manual_seed(rank)
        self.runtime = sparsefx.attach(self.runs, self.optimizer, total_steps=steps, generator=generator, **options)

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        loss_of(self.runs, batch(number)[self.part]).backward()
        self.optimizer.step()

    def masks(self) -> list[Tensor]:
        """All masks; of sharded parameters DTensors."""
        return list(sparsefx.masks(self.model).values())

    def state(self) -> dict[str, Any]:
        """What a distributed checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "sparsity": self.runtime.state_dict(),
        }

    def save(self, path: str, kind: str) -> None:
        if kind == "fsdp":
            dcp.save(self.state(), checkpoint_id=path)
        elif dist.get_rank() == 0:
            sparsefx.save(self.runs, path, runtime=self.runtime, extra={"optimizer": self.optimizer.state_dict()})

    def load(self, path: str, kind: str) -> None:
        if kind == "fsdp":
            state = self.state()
            dcp.load(state, checkpoint_id=path)
            self.model.load_state_dict(state["model"])
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
            self.runtime.load_state_dict(state["sparsity"])
        else:
            loaded = sparsefx.load(self.runs, path, runtime=self.runtime)
            self.optimizer.load_state_dict(loaded.extra["optimizer"])


def same_masks(joint: list[Tensor], single: list[Tensor]) -> bool:
    """Whether what this rank holds of the joint run's masks is the same part of the single run's. Nothing is sent."""
    pairs = [(mask, shards_of(mask, "a mask"), alone) for mask, alone in zip(joint, single, strict=True)]
    return all(torch.equal(values_of(mask), alone if cut is None else cut.part(alone)) for mask, cut, alone in pairs)


def digest(masks: list[Tensor]) -> int:
    """A checksum of whole masks."""
    return zlib.crc32(torch.cat([mask.flatten() for mask in masks]).to(torch.uint8).numpy().data)


def held_on_all_ranks(held: bool, digests: list[int]) -> bool:
    """Whether every rank says so, all with the same digests of the single run that they compared themselves with."""
    mine = torch.tensor([int(held), *digests])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return all(torch.equal(part, parts[0]) and bool(part[0]) for part in parts)


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between weights, as a share of the largest weight."""
    pairs = [(whole(a.detach()), whole(b.detach())) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    largest = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def check(method: int, steps: int, kind: str, *, save: str | None = None, resume: str | None = None) -> bool:
    """Run all ranks against one process; True where masks are equal at every step and weights within the tolerance.

    The joint run is saved to ``save`` at half time, or begins there with what was saved to ``resume``.
    """
    single, joint = Training(method, steps, kind=None), Training(method, steps, kind=kind)
    first = 0 if resume is None else steps // 2
    for number in range(first):
        single.step(number)
    if resume is not None:
        joint.load(resume, kind)
    start = single.masks()
    equal, moved, digests = same_masks(joint.masks(), start), 0, [digest(start)]
    for number in range(first, steps):
        if save is not None and number == steps // 2:
            joint.save(save, kind)
        single.step(number)
        joint.step(number)
        masks = single.masks()
        equal = equal and same_masks(joint.masks(), masks)
        digests.append(digest(masks))
        moved = max(moved, sum(int((now != then).sum()) for now, then in zip(masks, start, strict=True)))
    equal = held_on_all_ranks(equal, digests)
    off = distance(joint.model, single.model)
    held = equal and off <= TOLERANCE and moved > 0
    if dist.get_rank() == 0:
        algorithm, pattern, _ = METHODS[method]
        print(
            f"{kind:9} {algorithm:16} {pattern:20} masks equal: {equal}, moved {moved}, weights off by {off:.1e}: "
            f"{'held' if held else 'FAILED'}"
        )
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--methods", nargs="+", type=int, choices=range(len(METHODS)), default=range(len(METHODS)))
    parser.add_argument("--save", type=Path, help="save to FILE.KIND.METHOD at half time")
    parser.add_argument("--resume", type=Path, help="go on from FILE.KIND.METHOD at half time")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    if dist.get_rank() == 0:
        print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, gloo, {dist.get_world_size()} processes")
    held = True
    for kind in given.kinds:
        for method in given.methods:
            names = [None if path is None else f"{path}.{kind}.{method}" for path in (given.save, given.resume)]
            held = check(method, given.steps, kind, save=names[0], resume=names[1]) and held
    # Wrappers of models hold on to gloo's threads, which must have ended before the process does.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    if not held:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
