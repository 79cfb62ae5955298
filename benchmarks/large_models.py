"""Claims: sparsify and audit of a 7 B-parameter model on the meta device take no memory for weights; masking a bfloat16 model for
good with `sparsefx.mask_once` takes at most one more layer's memory at any time.

    python benchmarks/large_models.py                 # 7 B on the meta device, 1 B masked
    python benchmarks/large_models.py --billions 3    # needs 7 GB of memory

Memory is the process's peak resident set (VmHWM), reset before each measurement, above what is resident then; Linux only. The
peer (``--peer``) is `sparsefx.sparsify` with static masks and `sparsefx.finalize`, which keeps masks and a way back until it is
done. Largest layer: bytes of the largest weight that becomes sparse.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparsefx

MIB = 2**20
SIZES = {"0.1": (768, 2048, 12), "1": (2048, 5632, 18), "3": (2560, 6912, 36)}  # hidden, intermediate, layers
SLACK = 32 * MIB  # the interpreter's and the allocator's own


def meta_model(config: LlamaConfig, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(dtype)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def peak_of(work: Callable[[], object]) -> tuple[int, float]:
    """Peak memory above what was resident before, and seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start = resident("VmRSS"), time.perf_counter()
    work()
    return resident("VmHWM") - before, time.perf_counter() - start


def filled(config: LlamaConfig) -> nn.Module:
    """The model in bfloat16, filled parameter by parameter, so that building it takes no second copy either."""
    model = meta_model(config, torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", choices=tuple(SIZES), default="1")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "2:4-transposable", "unstructured"])
    parser.add_argument("--no-meta", action="store_true", help="leave the 7 B model out")
    parser.add_argument("--peer", action="store_true", help="measure sparsify and finalize too")
    given = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {threads} threads, seed 0")

    def on_meta() -> None:
        model = meta_model(LlamaConfig(), torch.float32)
        count = sum(parameter.numel() for parameter in model.parameters())
        sparsefx.sparsify(model, exclude=["lm_head"])
        layers = sparsefx.audit(model).layers
        print(
            f"meta device: {count / 1e9:.2f} B parameters, {sum(layer.sparse for layer in layers)} sparse of {len(layers)} layers"
        )

    held = True
    if not given.no_meta:
        peak, seconds = peak_of(on_meta)
        held = peak < 1024 * MIB
        told = "held" if held else "FAILED"
        print(f"  sparsify and audit: {peak / MIB:.0f} MiB, {seconds:.1f} s (float32 weights: 25.1 GiB): {told}")

    # What a first call loads for good (code of torch and of sparsefx) is not the model's.
    small = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=2)
    sparsefx.mask_once(filled(small))
    hidden, intermediate, layers = SIZES[given.billions]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=hidden // 128
    )
    for pattern in given.patterns:
        model = filled(config)
        bytes_of_all = sum(parameter.nbytes for parameter in model.parameters())
        names = [layer.parameter for layer in sparsefx.audit(model, pattern=pattern, exclude=["lm_head"]).layers if layer.sparse]
        largest = max(model.get_parameter(name).nbytes for name in names)
        peak, seconds = peak_of(lambda: sparsefx.mask_once(model, pattern=pattern, exclude=["lm_head"]))  # noqa: B023
        zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in names)
        share = zeros / sum(model.get_parameter(name).numel() for name in names)
        within = peak <= largest + SLACK
        held = held and within and abs(share - 0.5) < 1e-4
        told = f"{bytes_of_all / 2e9:.2f} B in bfloat16 ({bytes_of_all / MIB:.0f} MiB), {pattern}: {share:.1%} zeros"
        print(
            f"{told}, peak {peak / MIB:.0f} MiB more, largest layer {largest / MIB:.0f} MiB, {seconds:.1f} s: "
            f"{'held' if within else 'FAILED'}"
        )
        del model
    if given.peer:
        model = filled(config)
        peak, seconds = peak_of(lambda: sparsefx.finalize(sparsefx.sparsify(model, algorithm="static", exclude=["lm_head"])))
        print(f"peer, sparsify and finalize, 2:4: peak {peak / MIB:.0f} MiB more, {seconds:.1f} s")
    if not held:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
