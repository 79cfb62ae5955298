"""DistributedDataParallel and FSDP2 on two gloo processes that torchrun starts; the benchmark's own code, every method and
pattern."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def torchrun(processes: int, *arguments: str) -> list[str]:
    """The lines that rank 0 printed; fails where any rank did."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(ROOT / "benchmarks" / "distributed.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "masks equal" in line]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_ranks_equal_each_other_and_one_process_on_the_joined_batch() -> None:
    lines = torchrun(2)
    assert len(lines) == 33
    assert all("masks equal: True" in line and line.endswith("held") for line in lines)
    assert [sum(line.startswith(kind) for line in lines) for kind in ("ddp ", "ddp-bare ", "fsdp ")] == [11, 11, 11]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_a_run_saved_on_two_ranks_goes_on_with_one(tmp_path: Path) -> None:
    kinds = ("--kinds", "ddp", "fsdp")
    assert len(torchrun(2, "--save", str(tmp_path / "run"), *kinds)) == 22
    lines = torchrun(1, "--resume", str(tmp_path / "run"), *kinds)
    assert len(lines) == 22
    assert all(line.endswith("held") for line in lines)
