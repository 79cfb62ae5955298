"""What a one-shot method is: a statistic of a layer's inputs, and the weights and mask that follow from it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from sparsefx.patterns import Pattern


class OneShotMethod(ABC):
    """Chooses the mask of one layer from its weights and what its inputs were.

    Weights come as a matrix ``[outputs, columns]``, inputs as ``[samples, columns]``; a convolution's columns are its input
    channels at each place of the kernel, channels running fastest, so that N:M lies along consecutive columns.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What ``sparsify(..., algorithm=)`` takes."""

    @abstractmethod
    def refusal(self, pattern: Pattern) -> str | None:
        """Why the method cannot choose masks of this pattern, or None where it can."""

    @abstractmethod
    def empty(self, columns: int, like: Tensor) -> Tensor:
        """The statistic of no inputs, on the device of ``like``."""

    @abstractmethod
    def add(self, statistic: Tensor, inputs: Tensor) -> None:
        """Bring the statistic up to date with more inputs ``[samples, columns]``, in place."""

    @abstractmethod
    def solve(self, weight: Tensor, statistic: Tensor, pattern: Pattern, density: float) -> tuple[Tensor, Tensor]:
        """The new weight matrix, in the precision of ``weight``, and its mask; what the mask excludes is zero in it."""
