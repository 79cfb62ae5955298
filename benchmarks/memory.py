"""Claim: a sparse training step needs at most the masks (one byte a masked weight) and one layer's weight more than a dense one.

It holds for methods that keep no dormant values (SET, RigL, sparse momentum, static masks, ...). It does not hold for those
that do (the recipe, SR-STE, Top-KAST): every dormant value is kept beside the weight while the weight itself holds a zero in its
place, with 2:4 half an element a masked weight. docs/limits.md says why.

ResNet-50 and a 6-layer transformer encoder (d 512), AdamW. Bytes are those of torch's CPU allocator: what model, optimizer and
records hold before the step, and every allocation in it as the profiler saw it. The peak resident set of the process, which has
much else in it, is printed beside it. Every contestant runs in a process of its own.

    python benchmarks/memory.py [--model resnet50|transformer|all] [--batch 4]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.sparse_parameter import sparse_parameters

METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("dense", "", {}),
    ("magnitude", "2:4", {}),
    ("sr-ste", "2:4", {}),
    ("static", "2:4", {}),
    ("set", "unstructured", {"rewire_every": 1}),
    ("rigl", "2:4", {"rewire_every": 3}),
    ("sparse-momentum", "unstructured", {"rewire_every": 1}),
)


def model_of(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """The model and a batch for it."""
    torch.manual_seed(0)
    if name == "resnet50":
        import torchvision

        return torchvision.models.resnet50(weights=None), torch.randn(batch, 3, 224, 224)
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), torch.randn(batch, 128, 512)


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    for _, _, record in sparse_parameters(model):
        yield record.mask
        if record.compact is not None:
            yield record.compact
        yield from record.state.values()


def step_memory(model: nn.Module, batch: Tensor, algorithm: str, pattern: str, options: dict[str, Any]) -> dict[str, int]:
    """Bytes of one step, the third: held before it, at its peak, and what the bar is made of."""
    if pattern:
        sparsefx.sparsify(model, pattern=pattern, algorithm=algorithm)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    if pattern:
        sparsefx.attach(model, optimizer, total_steps=10, **options)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    step()
    step()
    optimizer.zero_grad()
    gc.collect()
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _held(model, optimizer)}.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    found = list(sparse_parameters(model))
    return {
        "held": held,
        "peak": held + peak,
        "masks": sum(record.mask.nbytes for _, _, record in found),
        "largest": max((parameter.nbytes for parameter in model.parameters()), default=0),
        "dormant": sum(record.compact.nbytes for _, _, record in found if record.compact is not None),
    }


def _child(name: str, batch: int, position: int) -> None:
    torch.set_num_threads(1)
    found = step_memory(*model_of(name, batch), *METHODS[position])
    found["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


def compare(name: str, batch: int) -> None:
    """Print a line a method."""
    results = []
    for position in range(len(METHODS)):
        code = f"from benchmarks.memory import _child; _child({name!r}, {batch}, {position})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    dense = results[0]
    mib = 1 << 20
    print(f"{name}, batch {batch}: dense step holds {dense['held'] / mib:.1f} MiB, at its peak {dense['peak'] / mib:.1f} MiB")
    for (algorithm, pattern, _), found in zip(METHODS[1:], results[1:], strict=True):
        more, bar = found["peak"] - dense["peak"], found["masks"] + found["largest"]
        resident = (found["resident"] - dense["resident"]) / mib
        print(
            f"  {algorithm + ' ' + pattern:32} peak {found['peak'] / mib:8.1f} MiB, {more / mib:+7.1f} of the dense step "
            f"({more / found['masks']:.2f} bytes a masked weight; ratio {found['peak'] / dense['peak']:.3f}); "
            f"bar {bar / mib:.1f} (masks {found['masks'] / mib:.1f} + largest layer): {'met' if more <= bar else 'not met'}; "
            f"dormant values {found['dormant'] / mib:.1f}; peak resident set {resident:+.0f} MiB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("resnet50", "transformer", "all"), default="all")
    parser.add_argument("--batch", type=int, default=4)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, CPU, 1 thread, seed 0, AdamW")
    for name in ("resnet50", "transformer") if given.model == "all" else (given.model,):
        compare(name, given.batch)


if __name__ == "__main__":
    main()
