"""All GPU benchmarks one after another, the tests that need a GPU first; one that fails does not stop the rest.

Further options go to every benchmark: ``--dtype bfloat16``, ``--dry``.

    python -m benchmarks.cuda.every [--seconds 120]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

TESTS = (
    "tests/ops/test_semi_structured.py",
    "tests/ops/test_cuda_transposable.py",
    "tests/ops/test_sparse_training.py",
    "tests/passes/test_lower_semi_structured.py",
)
BENCHMARKS = ("mask_and_pack", "training_linear", "inference_gemm", "inference_models", "training_step")


def run(command: list[str], seconds: float) -> bool:
    """Whether the command succeeded within its time; its output is shown as it comes."""
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    started = time.perf_counter()
    try:
        status = subprocess.run(command, check=False, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s")
        return False
    print(f"exit status {status} after {time.perf_counter() - started:.0f} s", flush=True)
    return status == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="for each of them")
    options, others = parser.parse_known_args()
    commands = {"tests": [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]}
    for name in BENCHMARKS:
        commands[name] = [sys.executable, "-m", f"benchmarks.cuda.{name}", *others]
    failed = [name for name, command in commands.items() if not run(command, options.seconds)]
    print(
        f"\n{len(commands) - len(failed)} of {len(commands)} ran to their end" + (f"; not: {', '.join(failed)}" if failed else "")
    )
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
