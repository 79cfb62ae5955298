"""What the contract test needs to run any algorithm with any pattern for a few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.algorithms import ALGORITHMS, Algorithm
from sparsefx.algorithms.at_start import AtStart
from sparsefx.runtime import MaskRuntime
from tests.training import batches, loss_of, small_net

BY_NAME = {algorithm.name: algorithm for algorithm in ALGORITHMS}
PATTERNS = (
    "unstructured",
    "unstructured:global",
    "2:4",
    "2:4-padded",
    "2:4-transposable",
    "4:8-transposable",
    "block:1x8",
    "block:4x4:norm=2",
    "block:1x1",
    "channel",
    "channel:coupled",
)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}
STEPS = 12


def sparsified(algorithm: Algorithm, pattern: str, seed: int = 0, **options: Any) -> nn.Module:
    """A small net with density 0.3 where the pattern leaves it free, and whatever the algorithm has to look at."""
    density = 0.3 if sparsefx.patterns.parse(pattern).fixed_density is None else None
    return sparsefx.sparsify(
        small_net(seed),
        pattern=pattern,
        density=density,
        algorithm=algorithm,
        calibration=batches(2, seed=5) if isinstance(algorithm, AtStart) else None,
        loss_fn=loss_of,
        example_inputs=batches(1)[0][0] if algorithm.name == "synflow" or pattern == "channel:coupled" else None,
        **options,
    )


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, algorithm: Algorithm, seed: int = 0) -> MaskRuntime:
    """Masks that move every third step, where the algorithm moves them now and then."""
    # A reset at every step would keep masks where they are, and so would a threshold below all weights.
    shortened: dict[str, Any] = {"rewire_every": 3, "exploit": "none", "threshold": 0.1}
    options: dict[str, Any] = {field.name: shortened[field.name] for field in fields(algorithm) if field.name in shortened}
    return sparsefx.attach(
        model,
        optimizer,
        total_steps=STEPS,
        steps_per_epoch=4,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> Iterator[int]:
    """Train, giving control back after each step."""
    for number, batch in enumerate(data, 1):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        yield number


def counts(model: nn.Module) -> dict[str, int]:
    """Weights that participate, by parameter."""
    return {name: int(mask.sum()) for name, mask in sparsefx.masks(model).items()}
