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
# The recipe with a threshold, sparse momentum, and RigL on 2:4 transposable: dormant values, densities that move, replaced steps.
WITH_STATE = ("2", "4", "9")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")


def told(command: list[str], **environment: str) -> list[str]:
    """The lines that rank 0 printed; fails where any rank did."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "masks equal" in line]
    assert all("masks equal: True" in line and line.endswith("held") for line in lines)
    return lines


def test_ranks_equal_one_process_on_the_joined_batch_and_one_process_resumes_what_they_saved(tmp_path: Path) -> None:
    script, saved = str(ROOT / "benchmarks" / "distributed.py"), str(tmp_path / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # One start of all processes for everything: starting them takes longer than training.
    lines = told([*torchrun, script, "--kinds", "ddp", "fsdp", "ddp-bare", "--save", saved])
    assert [sum(line.startswith(kind) for line in lines) for kind in ("ddp ", "fsdp ", "ddp-bare ")] == [11, 11, 11]
    methods = {tuple(line.split()[1:3]) for line in lines}
    patterns = ("2:4", "2:4-transposable", "unstructured")
    assert methods >= {(name, pattern) for name in ("magnitude", "set", "rigl") for pattern in patterns}
    assert ("sparse-momentum", "unstructured") in methods
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    resume = ["--kinds", "ddp", "fsdp", "--methods", *WITH_STATE, "--resume", saved]
    assert len(told([sys.executable, script, *resume], **alone)) == 6
