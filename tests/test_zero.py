"""ZeroRedundancyOptimizer (ZeRO stage 1) on two processes: each keeps the optimizer state of some parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import sparsefx
from sparsefx.errors import OptimizerError
from tests.processes import run_on
from tests.test_sharded import batch, net, step

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("magnitude", "2:4-transposable", {"exploit": "none"}),
    ("magnitude", "unstructured", {"exploit": "none"}),
    ("set", "unstructured", {"rewire_every": 3}),
    ("rigl", "2:4", {"rewire_every": 3}),
)


def test_masks_and_weights_are_those_of_one_process_and_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for told in run_on(2, _runs, tmp_path):
        assert told == ["held"] * 4 + ["refused"] * 2


def _runs(rank: int) -> list[str]:
    told: list[str] = []
    for algorithm, pattern, options in METHODS:
        alone = sparsefx.sparsify(net(rows=8), pattern=pattern, algorithm=algorithm)
        model = sparsefx.sparsify(net(rows=8), pattern=pattern, algorithm=algorithm)
        replica = nn.parallel.DistributedDataParallel(model)
        plain = torch.optim.Adam(alone.parameters(), 1e-2)
        zero = ZeroRedundancyOptimizer(replica.parameters(), optimizer_class=torch.optim.Adam, lr=1e-2)
        sparsefx.attach(alone, plain, total_steps=20, **options)
        sparsefx.attach(replica, zero, total_steps=20, **options)
        equal, first = True, sparsefx.masks(alone)
        for number in range(8):
            step(alone, plain, batch(number))
            step(replica, zero, batch(number)[rank::2])
            masks = sparsefx.masks(alone)
            equal = equal and all(torch.equal(mask, masks[name]) for name, mask in sparsefx.masks(model).items())
        off = max(float((a - b).detach().abs().max()) for a, b in zip(alone.parameters(), model.parameters(), strict=True))
        moved = any(not torch.equal(mask, first[name]) for name, mask in masks.items())
        told.append("held" if equal and moved and off < 1e-9 else f"{algorithm} {pattern}: masks {equal}, {moved}, off by {off}")
    replica = nn.parallel.DistributedDataParallel(sparsefx.sparsify(net(), pattern="unstructured", algorithm="sparse-momentum"))
    zero = ZeroRedundancyOptimizer(replica.parameters(), optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.9)
    told.append(_refusal(replica, zero, "each process has that of its own parameters only"))
    replica = nn.parallel.DistributedDataParallel(sparsefx.sparsify(net()))
    overlapped = ZeroRedundancyOptimizer(
        replica.parameters(), optimizer_class=torch.optim.SGD, overlap_with_ddp=True, lr=0.1, momentum=0.9
    )
    told.append(_refusal(replica, overlapped, "create it without overlap_with_ddp"))
    return told


def _refusal(model: nn.Module, optimizer: Any, expected: str) -> str:
    try:
        sparsefx.attach(model, optimizer, total_steps=20, rewire_every=2)
    except OptimizerError as error:
        return "refused" if expected in str(error) else str(error)
    return "not refused"
