"""Turns a solution into a plan: indices that stay, constants that move, numbers that modules hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from sparsefx.passes.channel_rules.products import matrix, weighted
from sparsefx.passes.channels.attributes import changed_attributes, changed_sizes
from sparsefx.passes.channels.carriers import carrier, input_groups, lost_constants
from sparsefx.passes.channels.computed import computed_weights
from sparsefx.passes.channels.facts import Facts, Heads, Split
from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.merge import Layer
from sparsefx.passes.channels.plan import ChannelPlan
from sparsefx.passes.channels.reasons import Reasons
from sparsefx.passes.channels.report import LayerWidths, PruningReport
from sparsefx.passes.channels.solve import Solution

Kept = dict[str, dict[int, Tensor]]


def build_plan(
    model: nn.Module,
    facts: Facts,
    layers: list[Layer],
    solution: Solution,
    *,
    unrounded: Solution,
    multiple: int,
    refused: tuple[str, ...],
    unread: tuple[str, ...],
    sized: Callable[[str], bool],
) -> ChannelPlan:
    """The plan of a solution.

    Args:
        model: the model itself.
        facts, layers: what was found out about it.
        solution: which channels stay.
        unrounded: which would stay without rounding widths up.
        multiple: that widths were rounded to.
        refused: groups that had to be kept whole, in words.
        unread: layers that no graph reads.
        sized: whether the module of this path has to be given the sizes of the parts that it takes.
    """
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    kept = _kept(facts, solution)
    shapes = {name: tuple(tensors[name].shape) for name in kept}
    after = {name: _shape_after(tuple(tensor.shape), kept.get(name, {})) for name, tensor in tensors.items()}
    moved: dict[str, tuple[Tensor, Tensor]] = {}
    new_biases: dict[str, int] = {}
    for layer in layers:
        for name, positions, values in _moves(layer, solution, after):
            moved[name] = (positions, values)
            if layer.fold is not None and layer.fold.new and name == layer.fold.tensor:
                new_biases[name] = len(positions)
    groups = {name: _groups_left(rows, solution) for name, (rows, _) in facts.gathered.items()}
    normalized = {path: int(solution.stays[solution.roots[labels]].sum()) for path, labels in facts.normalized.items()}
    heads = [(one.where, _counted(one, solution), one.size) for one in facts.heads]
    splits = [(one.where, *_part_sizes(one, solution)) for one in facts.splits if sized(one.where)]
    attributes = (
        (*changed_attributes(model, tensors, after, groups, normalized, heads), *changed_sizes(model, splits)) if kept else ()
    )
    report = _report(model, facts, layers, solution, unrounded, after, new_biases, moved, multiple)
    report = replace(report, refused=refused, unread=unread)
    return ChannelPlan(kept, shapes, new_biases, moved, attributes, report)


def _kept(facts: Facts, solution: Solution) -> Kept:
    kept: Kept = {}
    for (name, axis), labels in facts.axes.items():
        if name in facts.elements or (name in facts.gathered and axis == 1):
            continue
        stays = solution.stays[solution.roots[labels]]
        if not stays.all():
            kept.setdefault(name, {})[axis] = torch.from_numpy(np.flatnonzero(stays))
    for name, labels in facts.elements.items():
        stays = solution.stays[solution.roots[labels]]
        for axis in range(stays.ndim):
            along = stays.any(axis=tuple(other for other in range(stays.ndim) if other != axis))
            if not along.all():
                kept.setdefault(name, {})[axis] = torch.from_numpy(np.flatnonzero(along))
    for name, (_, columns) in facts.gathered.items():
        stays = solution.stays[solution.roots[columns]]
        left = stays[stays.any(axis=1)]
        if not left.all():
            indices = np.stack([np.flatnonzero(row) for row in left])
            kept.setdefault(name, {})[1] = torch.from_numpy(indices)
    return kept


def _counted(heads: Heads, solution: Solution) -> tuple[int, int]:
    """Heads before and after."""
    return len(heads.labels), int(solution.stays[solution.roots[heads.labels]].sum())


def _part_sizes(split: Split, solution: Solution) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels of each part before and after."""
    after = (int(solution.stays[solution.roots[labels]].sum()) for labels in split.parts)
    return tuple(len(labels) for labels in split.parts), tuple(after)


def _groups_left(rows: Integers, solution: Solution) -> int:
    return int(solution.stays[solution.roots[rows]].any(axis=1).sum())


def _shape_after(shape: tuple[int, ...], axes: dict[int, Tensor]) -> tuple[int, ...]:
    return tuple(int(axes[axis].shape[-1]) if axis in axes else size for axis, size in enumerate(shape))


def _moves(layer: Layer, solution: Solution, after: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What is added to which tensor in place of the constants that go."""
    lost = lost_constants(solution, layer)
    if not lost.any():
        return
    rows = np.flatnonzero(solution.stays[layer.out])
    weight = matrix(layer.read)
    groups = layer.read.groups
    group_of_row = rows * groups // len(layer.out)
    if layer.read.uniform:
        assert layer.fold is not None
        values = np.zeros(len(rows))
        for number, group in enumerate(input_groups(layer)):
            mine = group_of_row == number
            if lost[group].any() and mine.any():
                chosen = weight[torch.from_numpy(rows[mine])]
                values[mine] = weighted(chosen, lost[group], layer.constant[group][lost[group]])
        yield layer.fold.tensor, torch.arange(len(rows)), torch.from_numpy(layer.fold.sign * values)
        return
    yield from _carried(layer, solution, lost, rows, group_of_row, after[layer.read.weight.name])


def _carried(
    layer: Layer, solution: Solution, lost: np.ndarray, rows: Integers, group_of_row: Integers, shape: tuple[int, ...]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Additions to the column of each group's carrier."""
    read, weight = layer.read, matrix(layer.read)
    flat = torch.arange(math.prod(shape)).view(shape).movedim((read.out_axis, read.in_axis), (0, 1))
    flat = flat.flatten(2) if flat.dim() > 2 else flat.unsqueeze(2)
    positions, values = [], []
    for number, group in enumerate(input_groups(layer)):
        mine = group_of_row == number
        if not lost[group].any() or not mine.any():
            continue
        through = carrier(solution, layer, group)
        assert through is not None
        column = int(solution.stays[layer.into[group]][: through - group.start].sum())
        ratio = torch.from_numpy(layer.constant[group][lost[group]] / layer.constant[through]).to(weight.device)
        chosen = weight[torch.from_numpy(rows[mine])][:, torch.from_numpy(np.flatnonzero(lost[group]))].double()
        values.append(torch.einsum("kcp,c->kp", chosen, ratio).cpu().flatten())
        positions.append(flat[torch.from_numpy(np.flatnonzero(mine)), column].flatten())
    if positions:
        yield read.weight.name, torch.cat(positions), torch.cat(values)


def _report(
    model: nn.Module,
    facts: Facts,
    layers: list[Layer],
    solution: Solution,
    unrounded: Solution,
    after: dict[str, tuple[int, ...]],
    new_biases: dict[str, int],
    moved: dict[str, tuple[Tensor, Tensor]],
    multiple: int,
) -> PruningReport:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    places = _places(facts)
    by_name = {layer.read.weight.name: layer for layer in layers}
    reasons = Reasons(facts, layers, solution, unrounded)
    rows, nonzero = [], 0
    computed = computed_weights(model, [name for name, is_computed in places if is_computed])
    for (name, is_computed), number in places.items():
        if is_computed:
            if name in computed:
                rows.append(_computed_row(model, name, *computed[name], number))
                nonzero += number * int(torch.count_nonzero(computed[name][0]))
            continue
        tensor = model.get_parameter(name) if name in sizes else model.get_buffer(name)
        size, left = tensor.numel(), math.prod(after[name])
        nonzero += number * int(torch.count_nonzero(tensor.detach()))
        layer = by_name.get(name)
        if layer is None:  # depthwise: outputs are inputs
            labels = solution.roots[facts.axes[name, 0]]
            into, lost, empty = labels, 0, np.asarray((tensor.detach() == 0).flatten(1).all(1).cpu())
        else:
            labels, into = layer.out, layer.into
            lost, empty = int(lost_constants(solution, layer).sum()), np.asarray(~layer.used.any(axis=1))
        rows.append(
            LayerWidths(
                weight=name,
                inputs=len(into),
                outputs=len(labels),
                inputs_after=int(solution.stays[into].sum()),
                outputs_after=int(solution.stays[labels].sum()),
                outputs_needed=int(unrounded.stays[labels].sum()),
                empty=int(empty.sum()),
                folded=lost,
                operations=size * number,
                operations_after=left * number,
                pinned=reasons.pinned(labels),
                coupled=reasons.coupled(labels[empty]),
            )
        )
    return PruningReport(
        layers=tuple(rows),
        parameters=sum(sizes.values()),
        parameters_after=sum(math.prod(after[name]) for name in sizes) + sum(new_biases.values()),
        operations=sum(row.operations for row in rows),
        operations_after=sum(row.operations_after for row in rows),
        new_biases=new_biases,
        moved=tuple(moved),
        refused=(),
        multiple=multiple,
        operations_nonzero=nonzero,
    )


def _places(facts: Facts) -> dict[tuple[str, bool], int]:
    """Places of all calls of each weight, computed ones apart: in eval mode, or in train mode where eval mode has none."""
    evaluated = {(work.weight, work.computed) for work in facts.work if not work.training}
    places: dict[tuple[str, bool], int] = {}
    for work in facts.work:
        key = (work.weight, work.computed)
        if not work.training or key not in evaluated:
            places[key] = places.get(key, 0) + work.places
    return places


def _computed_row(model: nn.Module, name: str, weight: Tensor, why: str, places: int) -> LayerWidths:
    """The row of a weight that is no parameter: it stays as it is."""
    layer = model.get_submodule(name.rpartition(".")[0])
    transposed, groups = isinstance(layer, nn.modules.conv._ConvTransposeNd), int(getattr(layer, "groups", 1))
    by_group = weight.unflatten(0, (groups, -1))  # [groups, K / groups, C / groups, ...], transposed the other way round
    by_output = (by_group.transpose(1, 2) if transposed else by_group).flatten(0, 1).flatten(1)
    outputs = len(by_output)
    inputs = weight.shape[0] if transposed else weight.shape[1] * groups
    return LayerWidths(
        weight=name,
        inputs=inputs,
        outputs=outputs,
        inputs_after=inputs,
        outputs_after=outputs,
        outputs_needed=outputs,
        empty=int((by_output == 0).all(dim=1).sum()),
        folded=0,
        operations=weight.numel() * places,
        operations_after=weight.numel() * places,
        pinned=why,
    )
