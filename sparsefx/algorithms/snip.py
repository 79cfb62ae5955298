"""SNIP (Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.algorithms.at_start import AtStart, gradients, losses
from sparsefx.algorithms.start import Start


@dataclass(frozen=True)
class SNIP(AtStart):
    """Weights with the largest ``|gradient * w|`` participate, with the gradient of the mean loss of the calibration batches."""

    @property
    def name(self) -> str:
        return "snip"

    @property
    def summary(self) -> str:
        return "the weights with the largest |gradient * w| on some batches participate from the start, for good"

    def scores(self, start: Start) -> list[Tensor]:
        total = [torch.zeros_like(weight) for weight in start.weights]
        with start.unchanged(), torch.enable_grad():
            for loss, parameters in losses(start, self.name):
                for sum_, gradient in zip(total, gradients(loss, parameters), strict=True):
                    sum_ += gradient.detach()
        return [(gradient * weight).abs() for gradient, weight in zip(total, start.weights, strict=True)]


SNIP_SCORES = SNIP()
