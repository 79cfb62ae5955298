"""Claim: compact ONNX files take about 56 % (float16) and 53 % (float32) of the plain ones, and onnxruntime gives equal bits.

Five models with random weights, all eligible layers 2:4. Weights that no rule makes sparse (embeddings, first layers, heads)
stay dense and raise the share of the whole file; the share of the 2:4 weights' own bytes stands beside it. Loading is the
time until a session is ready, medians of interleaved runs: folding the decoders costs time that is told here.

    python benchmarks/compact_files.py [--models resnet50 ...] [--runs 5]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsefx
from benchmarks.deployed_models import DEPLOYED, llama
from sparsefx.onnx_audit import audit_onnx

SEED, BARS = 0, {"float16": 0.5626, "float32": 0.5313}


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {**DEPLOYED, "llama": lambda: llama(num_key_value_heads=8)}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(run: onnxruntime.InferenceSession, inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
    named = inputs if isinstance(inputs, dict) else {run.get_inputs()[0].name: inputs}
    return {name: value.numpy() for name, value in named.items()}


def load_times(paths: list[Path], runs: int) -> list[float]:
    """Seconds until a session is ready, medians, the files in turn."""
    seen: list[list[float]] = [[] for _ in paths]
    for _ in range(runs):
        for times, path in zip(seen, paths, strict=True):
            started = time.perf_counter()
            session(path)
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in seen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    print(f"device cpu ({platform.machine()}), {torch.get_num_threads()} threads, torch {torch.__version__}, onnxruntime "
          f"{onnxruntime.__version__}, sparsefx {sparsefx.__version__}, seed {SEED}, {arguments.runs} loads each")  # fmt: skip
    print(f"{'model':9} {'dtype':8} {'plain MB':>9} {'compact MB':>10} {'file':>6} {'2:4 part':>8} {'equal bits':>10} "
          f"{'restored':>8} {'load plain':>10} {'compact':>8} {'ratio':>6}")  # fmt: skip
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            for dtype in (torch.float32, torch.float16):
                torch.manual_seed(SEED)
                model, inputs = MODELS[name]()
                model = sparsefx.finalize(sparsefx.sparsify(model.eval(), algorithm="static", example_inputs=inputs)).to(dtype)
                if isinstance(inputs, Tensor):
                    inputs = inputs.to(dtype)
                plain, packed, back = (Path(folder) / f"{kind}.onnx" for kind in ("plain", "compact", "back"))
                sparsefx.export_onnx(model, inputs, plain)
                sparsefx.export_onnx(model, inputs, packed, weights="compact")
                sparsefx.densify_onnx(packed, back)
                restored = back.read_bytes() == plain.read_bytes()
                runs = [session(path) for path in (plain, packed)]
                outputs = [run.run(None, feed(run, inputs)) for run in runs]
                equal = all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(*outputs, strict=True))
                sizes = [weight.bytes for weight in audit_onnx(packed) if weight.encoding == "compact"]
                part = sum(size["compact"] or 0 for size in sizes) / sum(size["plain"] or 0 for size in sizes)
                seconds = load_times([plain, packed], arguments.runs)
                before, after = plain.stat().st_size, packed.stat().st_size
                text = str(dtype).removeprefix("torch.")
                failed |= not (equal and restored and part <= BARS[text])
                print(f"{name:9} {text:8} {before / 1e6:9.2f} {after / 1e6:10.2f} {after / before:6.1%} {part:8.2%} "
                      f"{'yes' if equal else 'NO':>10} {'yes' if restored else 'NO':>8} {seconds[0]:8.2f} s {seconds[1]:6.2f} s "
                      f"{seconds[1] / seconds[0]:6.2f}", flush=True)  # fmt: skip
    print("the claim does not hold" if failed else "the claim holds")
    sys.exit(failed)


if __name__ == "__main__":
    main()
