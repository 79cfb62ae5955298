"""Masks that stay for the whole run: by magnitude, as for fine-tuning pretrained weights (Mishra et al. 2021), or random."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsefx.algorithms.base import Algorithm, First, first_scores_of
from sparsefx.algorithms.options import expect_one_of
from sparsefx.algorithms.start import Start


@dataclass(frozen=True)
class Static(Algorithm):
    """Weights outside the first masks stay zero, and their gradients do not reach the optimizer.

    Attributes:
        first: which weights participate: the largest, or ones chosen at random.
    """

    first: First = "magnitude"

    def __post_init__(self) -> None:
        expect_one_of("first", self.first, First)

    @property
    def name(self) -> str:
        return "static" if self.first == "magnitude" else "static-random"

    @property
    def summary(self) -> str:
        which = "the largest |w| at the time of sparsify" if self.first == "magnitude" else "weights chosen at random"
        return f"{which} participate from then on; the others stay zero"

    @property
    def moves(self) -> bool:
        return False

    def shards_refusal(self) -> str | None:
        return None

    def first_scores(self, start: Start) -> list[Tensor]:
        return first_scores_of(self.first, start)


STATIC = Static()
STATIC_RANDOM = Static("random")
