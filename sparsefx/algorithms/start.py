"""What an algorithm may look at when it scores weights for the first masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Start:
    """A model that is about to become sparse.

    Attributes:
        model: with all its weights still dense.
        names: full names of the parameters that become sparse.
        weights: these parameters, detached.
        density: share of their weights that is to stay.
        generator: for whatever is random.
        calibration: batches to look at, or None.
        loss_fn: ``loss_fn(model, batch)`` is the loss of one batch, a tensor without dimensions; or None.
        inputs: positional and keyword arguments to run the model with, or None where ``sparsify`` was given no
            ``example_inputs``.
        unchanged: ``with start.unchanged():`` puts everything back that running the model in there has changed.
    """

    model: nn.Module
    names: Sequence[str]
    weights: Sequence[Tensor]
    density: float
    generator: torch.Generator
    unchanged: Callable[[], AbstractContextManager[None]]
    calibration: Iterable[Any] | None = None
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """The Parameters that become sparse."""
        return [self.model.get_parameter(name) for name in self.names]
