"""Claim: one-shot masks take, beside the model and the masks, the statistics of one block and the work on one layer.

A Llama-style decoder in float32 (76 M parameters, 24 layers, hidden size 512), masked 2:4 by Wanda and SparseGPT from two batches
of tokens, with `sparsefx.sparsify` (which keeps masks, a byte a weight) and `sparsefx.mask_once` (which keeps none). Memory is
the process's peak resident set above what is resident before; Linux only. Printed beside it: a copy of the masked weights, which
the way back took while it was kept in memory. It waits on the disk: bytes written there are those of the masked weights.

    python benchmarks/one_shot_memory.py
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsefx
from benchmarks.deployed_models import llama
from benchmarks.large_models import MIB, SLACK, peak_of

LAYERS, SEED = 24, 0


def measure(algorithm: str, function: str, batches: list[Any]) -> bool:
    """Mask a fresh model, print what it took beside what is allowed; whether that holds."""
    torch.manual_seed(SEED)
    model, _ = llama(num_hidden_layers=LAYERS)
    names = [row.parameter for row in sparsefx.audit(model, exclude=["lm_head"]).layers if row.sparse]
    weights = [model.get_parameter(name) for name in names]
    block = [model.get_parameter(name) for name in names if ".layers.0." in name]
    # Per column a sum of squares, or a row of the Gram matrix, in float64. Solving takes four more of these matrices, and a few
    # copies of the weight in float64.
    gram = algorithm == "sparsegpt"
    statistics = sum(8 * (weight.shape[1] ** 2 if gram else weight.shape[1]) for weight in block)
    layer = max((4 * 8 * weight.shape[1] ** 2 if gram else 0) + 4 * 8 * weight.numel() for weight in block)
    masks = sum(weight.numel() for weight in weights) if function == "sparsify" else 0
    bar = statistics + layer + masks + SLACK
    mask = getattr(sparsefx, function)
    peak, seconds = peak_of(lambda: mask(model, algorithm=algorithm, calibration=batches, exclude=["lm_head"]))
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    held = peak <= bar and abs(zeros - 0.5) < 1e-4
    print(
        f"{algorithm:9} {function:9} peak {peak / MIB:5.0f} MiB more; allowed {bar / MIB:.0f}: a block's statistics "
        f"{statistics / MIB:.0f}, a layer {layer / MIB:.0f}, masks {masks / MIB:.0f}, slack {SLACK / MIB:.0f}; a copy of weights "
        f"{sum(weight.nbytes for weight in weights) / MIB:.0f} MiB; {zeros:.1%} zeros, {seconds:.1f} s: "
        f"{'held' if held else 'FAILED'}",
        flush=True,
    )
    return held


def main() -> None:
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {threads} threads, seed {SEED}")
    torch.manual_seed(SEED)
    batches = [{"input_ids": torch.randint(0, 1000, (4, 64))} for _ in range(2)]
    warm, _ = llama(num_hidden_layers=1)
    sparsefx.mask_once(warm, algorithm="sparsegpt", calibration=batches)  # what a first call loads for good is not the model's
    held = [
        measure(algorithm, function, batches) for algorithm in ("wanda", "sparsegpt") for function in ("sparsify", "mask_once")
    ]
    print("the claim holds" if all(held) else "the claim does not hold")
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
