"""Finds which filters have to be empty together before anything can be cut out, for pattern ``channel:coupled``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsefx.passes.channels.facts import Facts
from sparsefx.passes.channels.graph import capture_channels
from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.merge import Layer, merge_reads
from sparsefx.passes.channels.reasons import Reasons
from sparsefx.passes.channels.solve import Mask, Solution
from sparsefx.passes.channels.trial import copy_with
from sparsefx.passes.propagate_channels import propagate_channels
from sparsefx.passes.prune_channels import ChannelPlanner
from sparsefx.patterns.coupled_channel import Coupled, CoupledChannel, Coupling


@dataclass(frozen=True)
class CoupledChannels:
    """What is coupled in a model.

    Attributes:
        members: the channels of each weight that can lose some, by full name.
        reasons: why the other weights that were asked for can lose none, by full name.
    """

    members: Mapping[str, Coupled]
    reasons: Mapping[str, str]


def couple_channels(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: Mapping[str, int], density: float
) -> CoupledChannels:
    """Follow the channels of a dense model; nothing is changed.

    A class of channels can go where nothing pins it and all weights that make it may become sparse. What the model's own code
    has against that is found by a trial: the share ``1 - density`` of a copy with random weights is emptied and cut out.

    Args:
        model: the model.
        args, kwargs: example inputs.
        axes: reduction axis of each weight that may become sparse, by full name.
        density: share of the classes that are to stay.

    Raises:
        CaptureError: torch.export does not take the model with these inputs.
    """
    propagation = propagate_channels(model, [capture_channels(model, args, kwargs)])
    roots = propagation.labels.roots()
    layers = merge_reads(model, propagation, roots, trains=False)
    pinned = Solution(propagation.facts, layers, roots)
    told = Reasons(propagation.facts, layers, pinned, pinned)
    outputs = {layer.read.weight.name: layer.out for layer in layers}
    reasons = {name: "its channels are followed by no rule" for name in axes if name not in outputs}
    left = [name for name in axes if name in outputs]
    while left:
        stays = pinned.needed.copy()
        for name, classes in outputs.items():
            if name not in left:
                stays[classes] = True
        held = [name for name in left if stays[outputs[name]].all()]
        for name in held:
            reasons[name] = told.pinned(outputs[name]) or _beside(outputs[name], outputs, left, reasons)
        left = [name for name in left if name not in held]
        if held:
            continue
        members = _members(propagation.facts, roots, layers, left, ~stays)
        found = _tried(model, args, kwargs, members, axes, density)
        if not found:
            return CoupledChannels(members, {name: _told(reason) for name, reason in reasons.items()})
        reasons.update(found)
        left = [name for name in left if name not in found]
    return CoupledChannels({}, {name: _told(reason) for name, reason in reasons.items()})


def _told(reason: str) -> str:
    return f"none of its channels could be cut out: {reason}"


def _beside(classes: Integers, outputs: Mapping[str, Integers], left: Sequence[str], reasons: Mapping[str, str]) -> str:
    """The dense layer whose channels go together with these."""
    mine = np.unique(classes)
    for name, others in outputs.items():
        if name not in left and np.isin(others, mine).any():
            why = f" ({reasons[name]})" if name in reasons else ""
            return f"they go together with those of {name}, which stays dense{why}"
    return "they go together with channels that stay"


def _members(facts: Facts, roots: Integers, layers: Sequence[Layer], names: Sequence[str], free: Mask) -> dict[str, Coupled]:
    """The coupling of these weights: classes are ranked with those that the same weights have, in the same groups."""
    outputs = {layer.read.weight.name: layer.out for layer in layers if layer.read.weight.name in names}
    signatures: dict[int, list[tuple[str, int, int]]] = {}
    for name, classes in outputs.items():
        found, counts = np.unique(classes[free[classes]], return_counts=True)
        for root, count in zip(found.tolist(), counts.tolist(), strict=True):
            signatures.setdefault(root, []).append((name, 0, count))
    for number, groups in enumerate(facts.blocks):
        # Equally many have to stay of each group of a convolution, and of each part of a chunk.
        for row, classes in enumerate(roots[groups.rows]):
            for root in np.unique(classes).tolist():
                if root in signatures:
                    signatures[root].append(("", number, row))
    by_signature: dict[tuple[tuple[str, int, int], ...], list[int]] = {}
    numbers = {root: number for number, root in enumerate(sorted(signatures))}
    for root, number in numbers.items():
        by_signature.setdefault(tuple(signatures[root]), []).append(number)
    sizes = tuple(len(block) for block in by_signature.values())
    blocks = torch.full((len(sizes), max(sizes)), len(numbers), dtype=torch.int64)
    for row, block in enumerate(by_signature.values()):
        blocks[row, : len(block)] = torch.tensor(block)
    coupling = Coupling(blocks, sizes, len(numbers))
    return {name: _coupled(coupling, [numbers.get(root, len(numbers)) for root in outputs[name].tolist()]) for name in names}


def _coupled(coupling: Coupling, classes: list[int]) -> Coupled:
    places: dict[int, list[int]] = {}
    for channel, number in enumerate(classes):
        if number < coupling.count:
            places.setdefault(number, []).append(channel)
    longest = max(len(channels) for channels in places.values())
    channels = torch.full((len(places), longest), len(classes), dtype=torch.int64)
    for row, found in enumerate(places.values()):
        channels[row, : len(found)] = torch.tensor(found)
    return Coupled(coupling, torch.tensor(classes), torch.tensor(list(places)), channels)


@torch.no_grad()
def _tried(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    members: Mapping[str, Coupled],
    axes: Mapping[str, int],
    density: float,
) -> dict[str, str]:
    """Reasons of the weights of which nothing could be cut out, though channels were empty."""
    trial = copy_with(model, torch.clone)
    _randomize(trial, torch.Generator().manual_seed(0))
    names = list(members)
    weights = [trial.get_parameter(name) for name in names]
    masks = CoupledChannel().choose(weights, [members[name] for name in names], density, [axes[name] for name in names])
    emptied = []
    for name, weight, mask in zip(names, weights, masks, strict=True):
        weight.masked_fill_(~mask, 0)
        if not bool(mask.all()):
            emptied.append(name)
    plan = ChannelPlanner(trial, args, kwargs, multiple=1, trains=False, seed=0, progress=lambda _: None).shaped_plan()
    rows = {row.weight: row for row in plan.report.layers}
    refused = "; ".join(plan.report.refused)
    return {name: rows[name].why or refused or "they stay" for name in emptied if rows[name].outputs_after == rows[name].outputs}


@torch.no_grad()
def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Values as training may leave them: shifts and scales that begin at zero or one hide what they would do."""

    def drawn(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for parameter in model.parameters():
        if parameter.is_floating_point():
            bound = 1.0 if parameter.dim() < 2 else float((3 * parameter.shape[0] / max(parameter.numel(), 1)) ** 0.5)
            drawn(parameter, -bound, bound)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            drawn(module.running_mean, -0.5, 0.5)
            drawn(module.running_var, 0.5, 1.5)
