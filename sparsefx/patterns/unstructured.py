"""Any weight may participate: the largest of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsefx.patterns.base import Pattern
from sparsefx.patterns.selection import largest, participating
from sparsefx.patterns.shapes import weight_refusal


@dataclass(frozen=True, repr=False)
class Unstructured(Pattern):
    """The ``round(density * numel)`` largest ``|scores|`` of a layer, at least one: an exact count."""

    @property
    def name(self) -> str:
        return "unstructured"

    @property
    def fixed_density(self) -> float | None:
        return None

    def refusal(self, shape: Sequence[int], *, reduction_axis: int = 1) -> str | None:
        return weight_refusal(shape, reduction_axis, axes=1, stacks=True)

    def _mask(self, scores: Tensor, density: float, reduction_axis: int) -> Tensor:
        return largest(scores, participating(density, scores.numel()))
