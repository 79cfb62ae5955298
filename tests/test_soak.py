"""A short run of the benchmark that trains for 20 000 steps: exact counts, nothing left over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The time of a step and the resident set are the machine's: the benchmark prints them, a test does not judge them.
CHECK = """
from benchmarks.soak import METHODS, soak
for algorithm, pattern, options in METHODS:
    found = soak(algorithm, pattern, options, 60, looks=3)
    assert not found.wrong_counts and not found.leaks, found
    assert found.tensors[-1] <= found.tensors[0], found
    assert found.moved > (20 if pattern else -1), found
print(len(METHODS), "runs")
"""


def test_counts_stay_exact_and_no_tensor_is_left_over() -> None:
    # In a process of its own, which holds no tensors of other tests.
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("runs")
