"""Runs that are killed at random moments and resumed end as uninterrupted ones do; the benchmark's own code, fewer runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, which this system cannot do")
def test_runs_that_are_killed_and_resumed_end_as_if_uninterrupted() -> None:
    assert importlib.util.find_spec("sparsefx") is not None
    command = [sys.executable, str(ROOT / "benchmarks" / "crash.py"), "--runs", "12", "--seed", "3"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "as if uninterrupted" in line]
    assert len(lines) == 2
    assert all("6 of 6" in line and "killed 0 times" not in line for line in lines)
