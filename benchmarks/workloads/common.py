"""What the workloads share: training sparse and dense from the same start, and the audit held to what should be sparse."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import sparsefx

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """One task.

    Attributes:
        name: of the task, and of the network.
        build: makes the model.
        batches: an endless, seeded stream.
        step: ``step(model, optimizers, batch)`` makes one training step and returns the loss; a GAN has two optimizers.
        measure: the figure at the end, on a batch of a stream with another seed; lower is better.
        inputs: example inputs of a batch.
        dense: layers that the paper's rule leaves dense, as ends of their names; all others have to be sparse.
        optimizers: made from the model.
    """

    name: str
    build: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    step: Callable[[Any, Sequence[Optimizer], Batch], Tensor]
    measure: Callable[[Any, Batch], Tensor]
    inputs: Callable[[Batch], Any]
    dense: tuple[str, ...] = ()
    optimizers: Callable[[Any], list[Optimizer]] = lambda model: [torch.optim.AdamW(model.parameters(), 2e-3)]


def plain_step(loss_of: Callable[[Any, Batch], Tensor]) -> Callable[[Any, Sequence[Optimizer], Batch], Tensor]:
    """A step of one optimizer on one loss."""

    def step(model: Any, optimizers: Sequence[Optimizer], batch: Batch) -> Tensor:
        loss = loss_of(model, batch)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        return loss.detach()

    return step


def expect_rule(workload: Workload, model: nn.Module) -> str:
    """The audit in a line. Raises AssertionError where a layer is sparse or dense against the rule."""
    audit = sparsefx.audit(model)
    for layer in audit.layers:
        expected = not layer.name.endswith(workload.dense) if workload.dense else True
        assert layer.sparse == expected, f"{layer.name}: {layer.reason or 'is sparse'}"
    left = "; ".join(f"{layer.name} {layer.reason.split(';')[0]}" for layer in audit.layers if not layer.sparse)
    return f"{audit.totals.sparse_layers} of {audit.totals.layers} layers sparse, dense: {left or 'none'}"


def train(workload: Workload, steps: int, seed: int, pattern: str | None) -> tuple[float, str]:
    """The measured figure after training, and the audit."""
    torch.manual_seed(seed)
    model, told = workload.build(), ""
    stream = workload.batches(seed)
    if pattern is not None:
        sparsefx.sparsify(model, pattern=pattern, example_inputs=workload.inputs(next(workload.batches(seed))))
    optimizers = workload.optimizers(model)
    if pattern is not None:
        sparsefx.attach(model, optimizers, total_steps=steps)
        told = expect_rule(workload, model)
    for _ in range(steps):
        workload.step(model, optimizers, next(stream))
    model.eval()
    held_out = workload.batches(1000 + seed)
    with torch.no_grad():
        return float(torch.stack([workload.measure(model, next(held_out)) for _ in range(8)]).mean()), told


def main(make: Callable[[str | None], Workload]) -> None:
    """The command line of a workload."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--data", help="folder with data sets, for those workloads that can use one; synthetic without")
    given = parser.parse_args()
    torch.set_num_threads(1)
    workload = make(given.data)
    untrained, _ = train(workload, 0, given.seed, None)
    dense, _ = train(workload, given.steps, given.seed, None)
    sparse, told = train(workload, given.steps, given.seed, given.pattern)
    print(f"{workload.name}: torch {torch.__version__}, {platform.machine()}, CPU, seed {given.seed}, {given.steps} steps")
    print(f"  {told}")
    print(f"  untrained {untrained:.4f}, dense {dense:.4f}, {given.pattern} {sparse:.4f}, ratio {sparse / dense:.3f}", flush=True)
