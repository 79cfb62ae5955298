"""Functions run on several gloo processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

Scenario = Callable[[int], Any]


def run_on(processes: int, scenario: Scenario, folder: Path) -> list[Any]:
    """What ``scenario(rank)`` gave on each process: tensors and plain values. Fails where it raised on any."""
    torch.multiprocessing.spawn(_process, args=(processes, scenario, str(folder)), nprocs=processes)
    return [torch.load(folder / f"{scenario.__name__}.{rank}.pt", weights_only=True) for rank in range(processes)]


def _process(rank: int, processes: int, scenario: Scenario, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/{scenario.__name__}.store"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=processes, timeout=timedelta(minutes=10)
    )
    torch.save(scenario(rank), f"{folder}/{scenario.__name__}.{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch's own threads now and then abort the interpreter as it winds up ("terminate called without ...")
