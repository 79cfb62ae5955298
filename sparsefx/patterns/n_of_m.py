"""N:M sparsity along the reduction axis (1D)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.errors import PatternError
from sparsefx.patterns.base import Pattern
from sparsefx.patterns.shapes import divisibility_refusal, weight_refusal


def check_n_of_m(n: int, m: int) -> None:
    """Raise PatternError unless 1 <= n <= m <= 16."""
    if not 1 <= n <= m <= 16:
        raise PatternError(f"pattern '{n}:{m}' was given; expected N:M with 1 <= N <= M <= 16, such as '2:4' or '4:8'")


@dataclass(frozen=True, repr=False)
class NOfM(Pattern):
    """In every aligned group of ``m`` weights along the reduction axis, the ``n`` largest ``|scores|`` participate.

    A Linear ``[out, in]`` has its groups along ``in``, a Conv ``[K, C, R, S]`` along ``C`` at each (r, s). With 2:4 this is
    what Sparse Tensor Cores compute with (Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021).
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_n_of_m(self.n, self.m)

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def fixed_density(self) -> float | None:
        return self.n / self.m

    def refusal(self, shape: Sequence[int], *, reduction_axis: int = 1) -> str | None:
        return weight_refusal(shape, reduction_axis, stacks=True) or divisibility_refusal(
            shape, reduction_axis, reduction_axis, self.m
        )

    def _mask(self, scores: Tensor, density: float, reduction_axis: int) -> Tensor:
        mask = torch.empty_like(scores, dtype=torch.bool)
        if self.n == self.m:
            return mask.fill_(True)
        members = scores.unflatten(reduction_axis, (-1, self.m)).unbind(reduction_axis + 1)
        places = mask.unflatten(reduction_axis, (-1, self.m)).unbind(reduction_axis + 1)
        keep = _two_of_four(members) if (self.n, self.m) == (2, 4) else _by_rank(members, self.n)
        for place, kept in zip(places, keep, strict=True):
            place.copy_(kept)
        return mask


def _two_of_four(members: Sequence[Tensor]) -> list[Tensor]:
    """Each member stays that wins two of its three comparisons; six comparisons in all."""
    a, b, c, d = (member.contiguous() for member in members)
    # An earlier member wins a tie.
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    return [
        (ab & (ac | ad)) | (ac & ad),
        (~ab & (bc | bd)) | (bc & bd),
        (~ac & (~bc | cd)) | (~bc & cd),
        ~((ad & (bd | cd)) | (bd & cd)),
    ]


def _by_rank(members: Sequence[Tensor], n: int) -> list[Tensor]:
    """Each member stays that fewer than ``n`` others beat; an earlier member wins a tie."""
    members = [member.contiguous() for member in members]
    lost = [torch.zeros_like(member, dtype=torch.uint8) for member in members]
    for first in range(len(members)):
        for second in range(first + 1, len(members)):
            first_wins = members[first] >= members[second]
            lost[second] += first_wins
            lost[first] += ~first_wins
    return [count < n for count in lost]
