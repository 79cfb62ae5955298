"""One magnitude threshold over all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from sparsefx.errors import NonFiniteError, PatternError
from sparsefx.patterns.base import Pattern
from sparsefx.patterns.selection import largest, participating
from sparsefx.patterns.shapes import weight_refusal


@dataclass(frozen=True, repr=False)
class GlobalUnstructured(Pattern):
    """The largest ``|scores|`` of all layers together; `mask` of one tensor treats it as the only layer."""

    @property
    def name(self) -> str:
        return "unstructured:global"

    @property
    def fixed_density(self) -> float | None:
        return None

    def refusal(self, shape: Sequence[int], *, reduction_axis: int = 1) -> str | None:
        return weight_refusal(shape, reduction_axis, axes=1, stacks=True)

    def masks(self, scores: Sequence[Tensor], density: float | None = None) -> list[Tensor]:
        """Masks that keep exactly ``round(density * weights in all layers)`` weights, at least one.

        Layers may differ in shape, floating dtype and device, and a layer may end up empty. Of equal scores, those of
        the earlier layer stay, and within a layer the first in row-major order.

        Args:
            scores: one floating point tensor a layer. Only magnitudes count.
            density: share of all weights that participate; None means 0.5.

        Returns:
            One bool tensor a layer, in its shape, device and memory layout.

        Raises:
            PatternError: the density is outside (0, 1], or a shape holds no weights.
            NonFiniteError: NaN or infinity among the scores.
        """
        density = self.resolve_density(density)
        for position, layer in enumerate(scores):
            reason = self.refusal(tuple(layer.shape))
            if reason is not None:
                raise PatternError(f"pattern {self.name!r}, layer {position}: {reason}")
            if layer.device.type != "meta" and not bool(torch.isfinite(layer).all()):
                raise NonFiniteError(f"the scores of layer {position} hold NaN or infinity; a mask needs finite values")
        return self.choose(scores, density)

    def choose(self, scores: Sequence[Tensor], density: float) -> list[Tensor]:
        """`masks` without its checks, so without waiting for a device."""
        if not scores:
            return []
        # Promotion to the widest dtype is exact, so that it changes no comparison.
        dtype = reduce(torch.promote_types, (layer.dtype for layer in scores))
        device = scores[0].device
        together = torch.cat([layer.detach().abs().reshape(-1).to(device, dtype) for layer in scores])
        chosen = largest(together, participating(density, together.numel()))
        pieces = chosen.split([layer.numel() for layer in scores])
        return [
            torch.empty_like(layer, dtype=torch.bool, requires_grad=False).copy_(piece.view(layer.shape))
            for layer, piece in zip(scores, pieces, strict=True)
        ]

    def _mask(self, scores: Tensor, density: float, reduction_axis: int) -> Tensor:
        return largest(scores, participating(density, scores.numel()))
