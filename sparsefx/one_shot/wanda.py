"""Wanda: Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language Models", 2023."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.one_shot.base import OneShotMethod
from sparsefx.patterns import GlobalUnstructured, Pattern
from sparsefx.patterns.unstructured import Unstructured


@dataclass(frozen=True)
class Wanda(OneShotMethod):
    """The weights with the largest |w| times the norm of their input over the calibration data stay, as they are.

    Without a structure weights compete within each output, as published; patterns compete within their groups. A layer whose
    inputs were all zero (an expert that no token reached) is masked by magnitude.
    """

    @property
    def name(self) -> str:
        return "wanda"

    def refusal(self, pattern: Pattern) -> str | None:
        if isinstance(pattern, GlobalUnstructured):
            return "its scores cannot be compared between layers; use 'unstructured'"
        return None

    def empty(self, columns: int, like: Tensor) -> Tensor:
        return torch.zeros(columns, dtype=torch.float64 if like.device.type == "cpu" else torch.float32, device=like.device)

    def add(self, statistic: Tensor, inputs: Tensor) -> None:
        statistic += inputs.to(statistic.dtype).square().sum(0)

    def solve(self, weight: Tensor, statistic: Tensor, pattern: Pattern, density: float) -> tuple[Tensor, Tensor]:
        norms = statistic.sqrt() if bool(statistic.any()) else torch.ones_like(statistic)
        scores = weight.abs().to(norms.dtype) * norms
        if isinstance(pattern, Unstructured):
            keep = max(1, round(density * weight.shape[1]))
            # Stable, so that of equal scores the first stays.
            best = scores.sort(dim=1, descending=True, stable=True).indices[:, :keep]
            mask = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, best, True)
        else:
            mask = pattern.mask(scores, density)
        return weight.masked_fill(~mask, 0), mask
