"""Gives the channels of a model an order in which 2:4 keeps more magnitude, with the same outputs.

Pool and Yu, "Channel permutations for N:M sparsity" (NeurIPS 2021): whatever produces the channels that a weight sums over is
permuted alike: the outputs of the layers before, biases, batch norms, everything that is added, concatenated or read elsewhere.
Which places change together comes from the same interpretation as channel pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsefx.errors import CaptureError, VerificationError
from sparsefx.passes.channel_rules.ordering import ORDERING
from sparsefx.passes.channel_rules.products import matrix
from sparsefx.passes.channels.facts import Facts, Read
from sparsefx.passes.channels.graph import ChannelGraph, capture_channels
from sparsefx.passes.channels.interchange import Interchange, find_interchange, varying
from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.passes.channels.report import PruningReport
from sparsefx.passes.channels.trial import ValueTrial, copy_with
from sparsefx.passes.propagate_channels import propagate_channels
from sparsefx.permutation import kept_magnitude

TOLERANCE = 1e-9
"""Largest difference of an output in float64, relative to its largest value, that counts as rounding."""

_HIDES = 1e-3
# Parameters whose values are all smaller are taken for numbers that training starts from, not for what it found.

_MOST_ROWS = 2**14
# A stream that dozens of layers read has millions of rows; the search then looks at every second one, or third, ...

Search = Callable[[Tensor, float], Tensor]
"""An order of the columns of a matrix [rows, channels], given the share of all work that it stands for."""


@dataclass(frozen=True)
class OrderedLayer:
    """One weight whose input channels were given an order.

    Attributes:
        weight: full name of the parameter.
        channels: how many of its input channels were given an order, in one set or several.
        before, after: share of the sum of |weight| that 2:4 keeps of these channels in the old and in the new order.
    """

    weight: str
    channels: int
    before: float
    after: float


@dataclass(frozen=True)
class ChannelOrder:
    """A new order of a model's channels.

    Attributes:
        plan: carries it out, see `sparsefx.apply_channel_plan`; every shape stays as it is.
        layers: the weights that gain by it, in order of execution.
        before, after: share of the sum of |weight| that 2:4 keeps, of all weights that were to gain.
        refused: orders that changed outputs and were left out, or why none was looked for, in words.
        difference: largest difference of an output in float64, relative to that output's largest value.
    """

    plan: ChannelPlan
    layers: tuple[OrderedLayer, ...]
    before: float
    after: float
    refused: tuple[str, ...]
    difference: float


@dataclass(frozen=True)
class _Reader:
    """A weight that sums over all channels of a group, whole groups of four at a time."""

    read: Read
    columns: Integers
    """Where the channels stand along the input axis (of their group of a grouped convolution); shape [times, channels].

    With grouped queries, each channel of a head of values is read at several places.
    """
    rows: slice

    @property
    def height(self) -> int:
        """Rows of `weight`."""
        return int((self.rows.stop - self.rows.start) * matrix(self.read).shape[2] * len(self.columns))

    def weight(self) -> Tensor:
        """[outputs, places and times; channels]."""
        chosen = matrix(self.read)[self.rows].detach().float()
        parts = [chosen[:, torch.from_numpy(columns)].movedim(1, 2).flatten(0, 1) for columns in self.columns]
        return torch.cat(parts)


def order_channels(
    model: nn.Module,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    weights: Collection[str],
    search: Search,
    seed: int,
) -> ChannelOrder:
    """The order of all channels that can be given one. Nothing is changed.

    Layers that run in train mode only, such as auxiliary heads, are given the order too; where the model has some and cannot be
    captured in train mode, all channels keep their places, since nothing would tell that a head reads the wrong ones.

    Args:
        model: whose outputs are to stay as they are.
        arguments: example inputs.
        weights: parameters that will be 2:4 along their input channels.
        search: finds an order for one matrix.
        seed: of the random inputs of the comparison.

    Raises:
        CaptureError: torch.export refuses the model.
        VerificationError: outputs differ even without any change of order.
    """
    graphs, told = _graphs(model, arguments)
    propagation = propagate_channels(model, graphs, rules=ORDERING)
    facts = propagation.facts
    interchange = find_interchange(facts, propagation.labels)
    reads = _reads(facts, weights)
    found: list[tuple[Integers, list[_Reader]]] = []
    for group in () if told else interchange.groups:
        readers = [reader for read in reads if (reader := _reader(read, interchange.roots, group)) is not None]
        if readers:
            found.append((group, readers))
    work = [len(group) * min(_MOST_ROWS, sum(reader.height for reader in readers)) for group, readers in found]
    moves = []
    for (group, readers), size in zip(found, work, strict=True):
        order = _searched(readers, search, size / sum(work))
        if (order != np.arange(len(order))).any():
            moves.append((group, group[order]))
    telling = _telling(model, seed)
    trials = [ValueTrial(telling, arguments, seed)]
    # A sum in another order rounds differently: where the model computes in float32 of its own accord, as far as that.
    limit = max(TOLERANCE, 30 * trials[0].noise(2**-24 if trials[0].narrows() else 1e-15))
    nothing = _plan(model, facts, interchange, [])
    if trials[0].difference(nothing) > limit:
        raise VerificationError(
            f"{type(model).__name__} gives other outputs for the same inputs each time, so that an order of channels cannot be "
            "checked; put it in eval mode, or take the random part out"
        )
    if len(graphs) > 1:
        trained = ValueTrial(telling, arguments, seed, training=True)
        # Dropout draws for each place, so that outputs then differ for every order.
        if not trained.draws():
            trials.append(trained)

    def difference(some: list[tuple[Integers, Integers]]) -> float:
        plan = _plan(model, facts, interchange, some)
        return max(trial.difference(plan) for trial in trials)

    def keeps_outputs(some: list[tuple[Integers, Integers]]) -> bool:
        return difference(some) <= limit

    kept, left_out = _that_pass(moves, keeps_outputs)
    plan = _plan(model, facts, interchange, kept)
    layers, before, after = _gains(found, kept)
    names = {id(group): readers[0].read.weight.name for group, readers in found}
    refused = [told] if told else []
    refused += [f"the {len(group)} inputs of {names[id(group)]}: outputs change with their order" for group, _ in left_out]
    return ChannelOrder(plan, layers, before, after, tuple(refused), difference(kept))


def _graphs(model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[list[ChannelGraph], str]:
    """The model in eval mode, and in train mode where eval mode leaves layers out; or why that could not be captured."""
    graphs = [capture_channels(model, *arguments)]
    read = graphs[0].read()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    unread = [name for name, tensor in tensors if tensor.is_floating_point() and tensor.dim() and name not in read]
    if not unread:
        return graphs, ""
    try:
        return [*graphs, capture_channels(model, *arguments, training=True)], ""
    except CaptureError as error:
        why = str(error.__cause__ or error).strip().splitlines()[0][:160]
        return graphs, f"eval mode does not read {unread[0]}, and train mode cannot be captured ({why}): all channels keep places"


def _telling(model: nn.Module, seed: int) -> nn.Module:
    """A copy in which no parameter hides what stands before it: heads and scales of a fresh model may be zero, or next to it."""
    generator = torch.Generator().manual_seed(seed)
    made = copy_with(model, torch.clone)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.abs().max() < _HIDES:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return made


def _reads(facts: Facts, weights: Collection[str]) -> list[Read]:
    """One read of each weight, in the order of execution: all calls of a weight have the same input channels."""
    first: dict[str, Read] = {}
    for read in facts.reads:
        if read.weight.name in weights:
            first.setdefault(read.weight.name, read)
    return list(first.values())


def _reader(read: Read, roots: Integers, group: Integers) -> _Reader | None:
    into = roots[read.into].reshape(read.groups, -1)
    inside = np.isin(into, group)
    rows = np.flatnonzero(inside.any(axis=1))
    times, rest = divmod(int(inside.sum()), len(group))
    if len(rows) != 1 or rest or into.shape[1] % 4:
        return None
    row = int(rows[0])
    quads = inside[row].reshape(-1, 4)
    if (quads.any(axis=1) != quads.all(axis=1)).any():
        return None  # groups of four are shared with channels that do not change places with these
    positions = np.flatnonzero(inside[row]).reshape(times, len(group))
    if (into[row, positions] != group).any():
        return None  # they stand in another order, or mixed with themselves, as after a flatten
    height = len(read.out) // read.groups
    return _Reader(read, positions, slice(row * height, (row + 1) * height))


def _searched(readers: list[_Reader], search: Search, share: float) -> Integers:
    """The order that is found for all weights that read the channels; the one they have where it is no better on all rows."""
    step = -(-sum(reader.height for reader in readers) // _MOST_ROWS)
    order = search(torch.cat([reader.weight()[::step] for reader in readers]), share)
    gain = sum(kept_magnitude(weight, order) - kept_magnitude(weight) for weight in (reader.weight() for reader in readers))
    found: Integers = order.numpy() if gain > 0 else np.arange(len(order))
    return found


def _that_pass(
    moves: list[tuple[Integers, Integers]], passes: Callable[[list[tuple[Integers, Integers]]], bool]
) -> tuple[list[tuple[Integers, Integers]], list[tuple[Integers, Integers]]]:
    """Moves that pass together, and the others: halves are tried, so that few bad ones cost few runs."""
    if not moves or passes(moves):
        return moves, []
    if len(moves) == 1:
        return [], moves
    middle = len(moves) // 2
    first, bad = _that_pass(moves[:middle], passes)
    second, others = _that_pass(moves[middle:], passes)
    if first and second and not passes(first + second):
        return first, bad + others + second
    return first + second, bad + others


def _plan(model: nn.Module, facts: Facts, interchange: Interchange, moves: list[tuple[Integers, Integers]]) -> ChannelPlan:
    """The new order of every axis in which the channels stand."""
    sources = np.arange(len(interchange.roots))
    for group, comes_from in moves:
        sources[group] = comes_from
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    kept: dict[str, dict[int, Tensor]] = {}

    def put(name: str, axis: int, classes: Integers) -> None:
        if (sources[classes] != classes).any():
            kept.setdefault(name, {})[axis] = torch.from_numpy(_order(classes, sources))

    for (name, axis), labels in facts.axes.items():
        if name not in facts.elements and not (name in facts.gathered and axis == 1):
            put(name, axis, interchange.roots[labels])
    for name, labels in facts.elements.items():
        cells = interchange.roots[labels]
        for axis in varying(cells)[:1]:
            put(name, axis, np.moveaxis(cells, axis, 0).reshape(cells.shape[axis], -1)[:, 0])
    for name, (_, columns) in facts.gathered.items():
        put(name, 1, interchange.roots[columns])
    shapes = {name: tuple(tensors[name].shape) for name in kept}
    count = sum(parameter.numel() for parameter in model.parameters())
    return ChannelPlan(kept, shapes, {}, {}, (), PruningReport((), count, count, 0, 0, {}, (), (), 1))


def _order(classes: Integers, sources: Integers) -> Integers:
    """Where each index of an axis takes its channel from; rows of a grouped convolution each by themselves.

    A channel that stands at several places of the axis, as after a flatten, keeps the order of these.
    """
    if classes.ndim == 2:
        return np.stack([_order(row, sources) for row in classes])
    order = np.empty(len(classes), dtype=np.int64)
    order[np.argsort(sources[classes], kind="stable")] = np.argsort(classes, kind="stable")
    return order


def _gains(
    found: list[tuple[Integers, list[_Reader]]], kept: list[tuple[Integers, Integers]]
) -> tuple[tuple[OrderedLayer, ...], float, float]:
    moved = {id(group): comes_from for group, comes_from in kept}
    channels: dict[str, int] = {}
    numbers: dict[str, np.ndarray[Any, Any]] = {}
    for group, readers in found:
        order = torch.from_numpy(np.searchsorted(group, moved.get(id(group), group)))
        for reader in readers:
            weight, name = reader.weight(), reader.read.weight.name
            parts = (float(weight.double().abs().sum()), kept_magnitude(weight), kept_magnitude(weight, order))
            numbers[name] = numbers.get(name, np.zeros(3)) + parts
            channels[name] = channels.get(name, 0) + (reader.columns.size if id(group) in moved else 0)
    layers = tuple(
        OrderedLayer(name, channels[name], float(before / all_of_it), float(after / all_of_it))
        for name, (all_of_it, before, after) in numbers.items()
        if channels[name] and all_of_it
    )
    total, before, after = sum(numbers.values(), np.zeros(3))
    return layers, float(before / (total or 1.0)), float(after / (total or 1.0))
