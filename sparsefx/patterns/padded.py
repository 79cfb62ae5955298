"""N:M for weights whose inputs are no multiple of M: the last group is shorter, as if zeros stood behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as functional
from torch import Tensor

from sparsefx.patterns.base import Pattern
from sparsefx.patterns.n_of_m import NOfM, check_n_of_m
from sparsefx.patterns.shapes import weight_refusal


@dataclass(frozen=True, repr=False)
class Padded(Pattern):
    """As `NOfM`, and of the last group, which may have fewer than ``m`` members, the ``n`` largest (or all) participate.

    Of the three input channels of an image, 2:4 keeps two at each place of the kernel. Once an export pads the channels with
    zeros to a multiple of ``m``, the weight is N:M in the ordinary sense. Where the inputs are a multiple of ``m`` the masks
    are those of `NOfM`. The density is n / m, and more in a layer with a shorter group.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_n_of_m(self.n, self.m)

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}-padded"

    @property
    def fixed_density(self) -> float | None:
        return self.n / self.m

    def refusal(self, shape: Sequence[int], *, reduction_axis: int = 1) -> str | None:
        return weight_refusal(shape, reduction_axis, stacks=True)

    def _mask(self, scores: Tensor, density: float, reduction_axis: int) -> Tensor:
        length = scores.shape[reduction_axis]
        # Of equal scores the first stays, so that a zero that is a weight goes before one that is not there.
        behind = [0] * (2 * (scores.dim() - 1 - reduction_axis))
        whole = functional.pad(scores, [*behind, 0, -length % self.m])
        mask = NOfM(self.n, self.m).mask(whole, reduction_axis=reduction_axis)
        return mask.narrow(reduction_axis, 0, length).contiguous()
