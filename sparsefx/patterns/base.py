"""What a pattern is: the set of masks a weight may have, and the best of them for given scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sparsefx.errors import NonFiniteError, PatternError


class Pattern(ABC):
    """The masks that a weight may have.

    A weight has an *output axis* and a *reduction axis* among its first two axes: Linear ``[out, in]`` and Conv
    ``[K, C, R, S]`` reduce along axis 1, ConvTranspose ``[C, K, R, S]`` and ``[in, out]`` matrices along axis 0. A stack of
    matrices ``[n, out, in]``, as mixtures of experts have them, reduces along axis 2.

    Ties are broken by position, the same way everywhere: of equal scores, the one that comes first in
    row-major order of the weight stays (transposable patterns state their own order of patterns).
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The text that `parse` reads back to an equal pattern."""

    @property
    @abstractmethod
    def fixed_density(self) -> float | None:
        """The density that every mask of this pattern has, or None where it can be chosen."""

    @abstractmethod
    def refusal(self, shape: Sequence[int], *, reduction_axis: int = 1) -> str | None:
        """Why a weight of this shape cannot take the pattern, or None where it can."""

    @abstractmethod
    def _mask(self, scores: Tensor, density: float, reduction_axis: int) -> Tensor:
        """The mask for non-negative finite scores of an accepted shape."""

    @final
    def resolve_density(self, density: float | None) -> float:
        """The density in force. Raises PatternError where it contradicts the pattern or is outside (0, 1]."""
        fixed = self.fixed_density
        if fixed is not None:
            if density is not None and abs(density - fixed) > 1e-12:
                raise PatternError(
                    f"density {density} was given for pattern {self.name!r}, whose density is always {fixed:g}; "
                    f"leave density out, or choose a pattern with a free density such as 'unstructured'"
                )
            return fixed
        if density is None:
            density = 0.5
        if not isinstance(density, (int, float)) or isinstance(density, bool) or not 0 < density <= 1:
            raise PatternError(f"density {density!r} was given; expected a number in (0, 1], such as 0.5")
        return float(density)

    @final
    def mask(self, scores: Tensor, density: float | None = None, *, reduction_axis: int = 1) -> Tensor:
        """The allowed mask that keeps the largest total ``|scores|``.

        Args:
            scores: floating point, of the weight's shape. Only magnitudes count.
            density: share of weights that participate; None means the pattern's own (0.5 where it is free).
            reduction_axis: 0 or 1, the axis along which the layer sums; 2 for a stack of matrices.

        Returns:
            bool tensor of the same shape and device, True where a weight participates.

        Raises:
            PatternError: the shape or the density does not fit the pattern.
            NonFiniteError: NaN or infinity among the scores.
        """
        density = self.resolve_density(density)
        reason = self.refusal(tuple(scores.shape), reduction_axis=reduction_axis)
        if reason is not None:
            raise PatternError(f"pattern {self.name!r}: {reason}")
        if scores.device.type != "meta" and not bool(torch.isfinite(scores).all()):
            raise NonFiniteError("the scores hold NaN or infinity; a mask needs finite values")
        return self._mask(scores.detach().abs(), density, reduction_axis)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"
