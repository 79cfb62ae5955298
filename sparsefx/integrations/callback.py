"""What the callbacks of all trainers have in common: their options, the runtime while training goes on, and its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparsefx.api import finalize
from sparsefx.integrations.watch import MaskWatch
from sparsefx.patterns import Pattern
from sparsefx.runtime import MaskRuntime


class SparseTraining:
    """Options of a callback, and what it follows; to be inherited beside a trainer's own callback class.

    Args:
        pattern: as for `sparsefx.sparsify`.
        sparsify_options: the other arguments of `sparsefx.sparsify`.
        attach_options: those of `sparsefx.attach`.
        finalize_at_end: end sparse training with `sparsefx.finalize` when training ends.
    """

    def __init__(
        self,
        pattern: str | Pattern = "2:4",
        *,
        sparsify_options: Mapping[str, Any] | None = None,
        attach_options: Mapping[str, Any] | None = None,
        finalize_at_end: bool = False,
    ) -> None:
        self._pattern = pattern
        self._sparsify_options = dict(sparsify_options or {})
        self._attach_options = dict(attach_options or {})
        self._finalize_at_end = finalize_at_end
        self._watch: MaskWatch | None = None
        self.runtime: MaskRuntime | None = None

    def _stop(self, finalized: nn.Module | None = None) -> None:
        """Stop following, if that was begun, and finalize the module given, if that was asked for."""
        if self.runtime is None:
            return
        self.runtime.detach()
        self.runtime = self._watch = None
        if self._finalize_at_end and finalized is not None:
            finalize(finalized)


def inner_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside a trainer's wrapper, whose steps are the ones that are made."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    found: Optimizer = optimizer
    return found
