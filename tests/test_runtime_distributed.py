"""MaskRuntime under DistributedDataParallel, on two gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsefx
from tests.test_runtime_hostile import net, train


def test_replicas_with_different_seeds_start_from_the_masks_of_the_first(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.multiprocessing.spawn(_replica, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, saved in first["masks"].items():
        assert torch.equal(saved, second["masks"][name])
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name])


def _replica(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = sparsefx.sparsify(net(seed=rank))
    replica = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(replica.parameters(), 1.0, momentum=0.9)
    # Dormant values must act, or replicas that differ in them alone would look equal.
    sparsefx.attach(replica, optimizer, total_steps=100, exploit="none")
    train(replica, optimizer, 12, first=100 * rank)
    torch.save({"masks": sparsefx.masks(model), "model": model.state_dict()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
