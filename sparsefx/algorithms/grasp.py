"""GraSP (Wang, Zhang and Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsefx.algorithms.at_start import AtStart, gradients, losses
from sparsefx.algorithms.start import Start
from sparsefx.errors import CaptureError


@dataclass(frozen=True)
class GraSP(AtStart):
    """Weights with the largest ``w * (H g)`` participate: those whose removal would lower the norm of the gradient g most.

    H and g are those of the loss summed over the calibration batches, which are gone through twice. The paper divides logits by a
    temperature of 200; that belongs into ``loss_fn``.
    """

    @property
    def name(self) -> str:
        return "grasp"

    @property
    def summary(self) -> str:
        return "the weights that most preserve the flow of gradients participate from the start, for good"

    def scores(self, start: Start) -> list[Tensor]:
        if isinstance(start.calibration, Iterator):
            start = replace(start, calibration=list(start.calibration))
        flow = [torch.zeros_like(weight) for weight in start.weights]
        # Fused attention kernels have no second derivative.
        with start.unchanged(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            whole = [torch.zeros_like(weight) for weight in start.weights]
            for loss, parameters in losses(start, self.name):
                for sum_, part in zip(whole, gradients(loss, parameters), strict=True):
                    sum_ += part
            for loss, parameters in losses(start, self.name):
                first = gradients(loss, parameters, keep_graph=True)
                # d/dw of g * g(w), with the first g held, is the product of Hessian and gradient.
                product = torch.stack([(sum_ * part).sum() for sum_, part in zip(whole, first, strict=True)]).sum()
                try:
                    products = gradients(product, parameters)
                except RuntimeError as error:
                    raise CaptureError(
                        f"grasp: an operation of the model has no second derivative: {error}; choose algorithm 'snip' or "
                        "'synflow'"
                    ) from error
                for sum_, second in zip(flow, products, strict=True):
                    sum_ += second.detach()
        scores = [weight * second for weight, second in zip(start.weights, flow, strict=True)]
        # Signs count here, and masks keep the largest magnitudes: moved up together, so that all layers stay comparable.
        lowest = torch.stack([score.min().cpu() for score in scores]).min()
        return [score - lowest.to(score) for score in scores]


GRASP = GraSP()
