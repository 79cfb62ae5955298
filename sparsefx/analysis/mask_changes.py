"""What masks do over time: flips, density, empty channels, and how many weights were ever used. No history is kept of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsefx.sparse_parameter import sparse_parameters


class MaskChanges:
    """Counts where masks differ from the last time. It keeps a copy of them: one byte a masked weight."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last = {name: record.mask.clone() for name, _, record in sparse_parameters(model)}

    def flips(self) -> dict[str, Tensor]:
        """By parameter: entries that changed since the last call, a whole number without dimensions on the mask's device.

        A parameter that has another shape than the last time (channels were removed) starts anew, with none.
        """
        counted: dict[str, Tensor] = {}
        for name, _, record in sparse_parameters(self._model):
            before = self._last.get(name)
            if before is None or before.shape != record.mask.shape or before.device != record.mask.device:
                self._last[name] = record.mask.clone()
                counted[name] = torch.zeros((), dtype=torch.int64, device=record.mask.device)
            else:
                counted[name] = (before != record.mask).sum()
                before.copy_(record.mask)
        return counted


@dataclass(frozen=True)
class MaskPoint:
    """One layer's mask over some steps of a run.

    Attributes:
        step: the last of these steps.
        flip_rate: share of the layer's weights whose place in the mask changed from one look to the next, on average.
        density: share that participates at that step.
        ever_used: share that has participated at any look until then.
        empty_channels: output channels that hold only zeros at that step.
    """

    step: int
    flip_rate: float
    density: float
    ever_used: float
    empty_channels: int


class LayerMaskHistory:
    """One layer's `MaskPoint` series in fixed memory: when ``capacity`` points are there, neighbours are merged in pairs.

    Flips are averaged over the looks that a point stands for, so that merging takes nothing from them.
    """

    def __init__(self, mask: Tensor, *, capacity: int) -> None:
        self._capacity = capacity
        self._per_point = 1
        self._points: list[MaskPoint] = []
        self._ever = mask.clone()
        self._flips = torch.zeros((), dtype=torch.int64, device=mask.device)
        self._looks = 0

    @torch.no_grad()
    def look(self, step: int, mask: Tensor, flips: Tensor, weight: Tensor, reduction_axis: int) -> None:
        """Note the mask after a step; ``flips`` of its entries changed since the last look."""
        self._ever |= mask
        self._flips += flips
        self._looks += 1
        if self._looks < self._per_point:
            return
        # One transfer for all figures of a point.
        by_channel = weight.flatten(0, 1) if reduction_axis == 2 else weight.movedim(1 - reduction_axis, 0).flatten(1)
        empty = (by_channel == 0).all(1).sum()
        figures = torch.stack([self._flips, mask.sum(), self._ever.sum(), empty]).tolist()
        size = mask.numel()
        self._points.append(
            MaskPoint(step, figures[0] / (size * self._looks), figures[1] / size, figures[2] / size, int(figures[3]))
        )
        self._flips.zero_()
        self._looks = 0
        if len(self._points) == self._capacity:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [
                MaskPoint(two.step, (one.flip_rate + two.flip_rate) / 2, two.density, two.ever_used, two.empty_channels)
                for one, two in pairs
            ]
            self._per_point *= 2

    @property
    def points(self) -> tuple[MaskPoint, ...]:
        """By rising step."""
        return tuple(self._points)
