"""Whole filters that go together through the network participate or do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.patterns.channel import Channel
from sparsefx.patterns.selection import participating, summation_dtype


@dataclass(eq=False)
class Coupling:
    """Which classes of channels are ranked with each other; shared by the weights that have them.

    A class is what has to be empty as a whole before anything can be cut: the filters of several layers that are added up, or the
    rows of an attention head.

    Attributes:
        blocks: classes by number, each block a row, filled up with `count`; int64, shape [blocks, classes of the longest].
        sizes: classes of each block.
        count: number of classes.
    """

    blocks: Tensor
    sizes: tuple[int, ...]
    count: int


@dataclass(eq=False)
class Coupled:
    """The channels of one weight in a `Coupling`.

    Attributes:
        coupling: what they are ranked in.
        classes: of each output channel, `Coupling.count` for those that always participate; int64, shape [K].
        members: the classes of this weight; int64, shape [M].
        channels: the channels of each of them, filled up with K; int64, shape [M, channels of the largest].
    """

    coupling: Coupling
    classes: Tensor
    members: Tensor
    channels: Tensor

    def follow(self, device: torch.device) -> None:
        """Move to the device of the weight."""
        if self.classes.device != device:
            self.classes, self.members, self.channels = (
                tensor.to(device) for tensor in (self.classes, self.members, self.channels)
            )


@dataclass(frozen=True, repr=False)
class CoupledChannel(Channel):
    """Of each block of classes, the ``round(density * classes)`` with the largest sum of ``|scores|`` over all their filters.

    So what is empty can be cut out: a filter whose output is added to those of other layers stays as long as one of them does
    (the dependency graph of Fang et al., "DepGraph: Towards Any Structural Pruning", 2023; the sum is that of `Channel`).
    `mask` of one tensor treats it as the only layer.
    """

    @property
    def name(self) -> str:
        return "channel:coupled"

    def choose(self, scores: Sequence[Tensor], members: Sequence[Coupled], density: float, axes: Sequence[int]) -> list[Tensor]:
        """Masks of all weights of a coupling.

        Args:
            scores: one tensor a weight, in its shape. Only magnitudes count.
            members: one a weight, all of the same `Coupling`.
            density: share of the classes of each block that participate.
            axes: the reduction axis of each weight.

        Returns:
            One bool tensor a weight, in its shape, device and memory layout. Nothing waits for the device.
        """
        coupling = members[0].coupling
        device = scores[0].device
        totals = torch.zeros(coupling.count + 1, dtype=summation_dtype(scores[0]), device=device)
        for layer, member, axis in zip(scores, members, axes, strict=True):
            member.follow(layer.device)
            units = self.unit_scores(layer.detach().abs(), axis).reshape(-1)
            padded = torch.cat([units, units.new_zeros(1)])
            # Classes of one weight differ, so that sums are made in one order on every device.
            totals[member.members.to(device)] += padded[member.channels].sum(1).to(device)
        chosen = self._best(coupling, totals, density)
        return [
            self.spread(_placed(chosen, layer, member, axis), torch.empty_like(layer, requires_grad=False), axis)
            for layer, member, axis in zip(scores, members, axes, strict=True)
        ]

    def widened(
        self, masks: Sequence[Tensor], members: Sequence[Coupled], density: float, axes: Sequence[int]
    ) -> list[Tensor] | None:
        """Masks of whole classes that hold all of these masks; None where those would be more than ``density`` allows."""
        coupling = members[0].coupling
        device = masks[0].device
        found = torch.zeros(coupling.count + 1, dtype=torch.bool, device=device)
        for mask, member, axis in zip(masks, members, axes, strict=True):
            member.follow(mask.device)
            others = [other for other in range(mask.dim()) if other != 1 - axis]
            some = mask.any(dim=others) if others else mask
            found[member.classes[some].to(device)] = True
        found[coupling.count] = False
        counts = found[coupling.blocks.to(device)].sum(1).tolist()
        if any(count > participating(density, size) for count, size in zip(counts, coupling.sizes, strict=True)):
            return None
        found[coupling.count] = True
        return [
            self.spread(_placed(found, mask, member, axis), mask, axis)
            for mask, member, axis in zip(masks, members, axes, strict=True)
        ]

    def _best(self, coupling: Coupling, totals: Tensor, density: float) -> Tensor:
        coupling.blocks = coupling.blocks.to(totals.device)
        totals[coupling.count] = -1  # what fills a block up comes last
        order = totals[coupling.blocks].argsort(dim=1, descending=True, stable=True)
        counts = torch.tensor([participating(density, size) for size in coupling.sizes]).to(totals.device)
        first = torch.arange(coupling.blocks.shape[1], device=totals.device) < counts[:, None]
        chosen = torch.zeros(coupling.count + 1, dtype=torch.bool, device=totals.device)
        ranked = coupling.blocks.gather(1, order)
        chosen[torch.where(first, ranked, coupling.count).reshape(-1)] = True
        return chosen


def _placed(chosen: Tensor, weight: Tensor, member: Coupled, axis: int) -> Tensor:
    """Of each channel whether its class was chosen, with the weight's axes, all of size 1 but the output axis."""
    shape = [1] * weight.dim()
    shape[1 - axis] = -1
    return chosen.to(weight.device)[member.classes].view(shape)
