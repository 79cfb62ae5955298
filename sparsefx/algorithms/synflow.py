"""SynFlow (Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from sparsefx.algorithms.at_start import AtStart
from sparsefx.algorithms.options import expect_steps
from sparsefx.algorithms.start import Start
from sparsefx.errors import CaptureError, OptionError
from sparsefx.patterns.selection import largest, participating


@dataclass(frozen=True)
class SynFlow(AtStart):
    """Weights that carry the most flow when all parameters are made positive and all inputs are one; no data is looked at.

    Pruned in many rounds, the density falling exponentially, so that no layer is emptied. Runs in eval mode and in float64,
    since the flow through deep networks overflows float32. ``example_inputs`` give the shapes; integer inputs stay what they are.

    Attributes:
        rounds: of pruning.
    """

    rounds: int = 100

    def __post_init__(self) -> None:
        expect_steps("rounds", self.rounds)

    @property
    def name(self) -> str:
        return "synflow"

    @property
    def summary(self) -> str:
        return "the weights that carry the most flow of ones participate from the start, for good; looks at no data"

    def scores(self, start: Start) -> list[Tensor]:
        if start.inputs is None:
            raise OptionError(
                "algorithm 'synflow' lets ones flow through the model; give sparsify example_inputs for their shapes"
            )
        with start.unchanged(), torch.enable_grad():
            start.model.eval()
            values = {**dict(start.model.named_parameters()), **dict(start.model.named_buffers())}
            state = {name: _positive(value) for name, value in values.items()}
            args, kwargs = tree_map(_ones, start.inputs)
            return self._rounds(start, state, args, kwargs)

    def _rounds(self, start: Start, state: dict[str, Tensor], args: Any, kwargs: Any) -> list[Tensor]:
        found = [torch.zeros_like(state[name]) for name in start.names]
        masks = [torch.ones_like(value, dtype=torch.bool) for value in found]
        total = sum(mask.numel() for mask in masks)
        for number in range(1, self.rounds + 1):
            pruned = [(state[name] * mask).requires_grad_() for name, mask in zip(start.names, masks, strict=True)]
            try:
                outputs = functional_call(start.model, {**state, **dict(zip(start.names, pruned, strict=True))}, args, kwargs)
            except RuntimeError as error:
                raise CaptureError(
                    f"synflow: the model does not run in float64 on inputs of ones: {error}; choose algorithm 'snip', or 'static'"
                ) from error
            flow = [leaf.sum() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
            given = torch.autograd.grad(torch.stack(flow).sum(), pruned, allow_unused=True)
            carried = [
                torch.zeros_like(weight) if gradient is None else (gradient * weight).detach()
                for gradient, weight in zip(given, pruned, strict=True)
            ]
            highest = max(float(flow_.max()) for flow_ in carried) or 1.0
            # Weights that stay longer rank above all that were pruned before them.
            for score, mask, flow_ in zip(found, masks, carried, strict=True):
                score[mask] = number + (flow_ / highest)[mask]
            keep = participating(start.density ** (number / self.rounds), total)
            together = largest(torch.cat([score.reshape(-1) for score in found]), keep)
            masks = [
                piece.view(mask.shape)
                for piece, mask in zip(together.split([mask.numel() for mask in masks]), masks, strict=True)
            ]
        return found


def _positive(value: Tensor) -> Tensor:
    return value.detach().abs().double() if value.is_floating_point() else value.detach().clone()


def _ones(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.ones_like(value, dtype=torch.float64)
    return value


SYNFLOW = SynFlow()
