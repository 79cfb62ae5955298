"""Two plans that were carried out one after the other, as one plan for the model before the first of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparsefx.errors import StateError
from sparsefx.passes.channels.cut import cut
from sparsefx.passes.channels.plan import Attribute, ChannelPlan

Shape = tuple[int, ...]
Axes = Mapping[int, Tensor]


def compose(first: ChannelPlan, second: ChannelPlan, shapes: Mapping[str, Shape]) -> ChannelPlan:
    """The plan that does at once what ``first`` and then ``second`` did. Its report is that of ``second``.

    Args:
        first, second: plans in the order in which they were carried out. Where ``second`` cuts nothing, ``first`` is the result.
        shapes: of all parameters and buffers between the two, by first name.

    Raises:
        StateError: between the two, the model no longer was as ``first`` left it, so that no plan leads there.
    """
    if second.empty:
        return first
    _check_is_left_by(first, shapes)
    added = first.new_biases.keys()
    kept: dict[str, Axes] = {}
    before: dict[str, Shape] = {}
    for name in (first.kept.keys() | second.kept.keys()) - added:
        one, other = first.kept.get(name, {}), second.kept.get(name, {})
        kept[name] = _composed_axes(one, other, shapes[name])
        before[name] = first.shapes.get(name, shapes[name])
    moved: dict[str, tuple[Tensor, Tensor]] = {}
    for name in [*first.moved, *(name for name in second.moved if name not in first.moved)]:
        moved[name] = _composed_moves(first, second, name, shapes) if name in first.moved else second.moved[name]
    biases = {name: len(moved[name][1]) for name in [*first.new_biases, *second.new_biases]}
    return replace(
        second,
        kept=dict(sorted(kept.items())),
        shapes=before,
        new_biases=biases,
        moved=moved,
        attributes=_composed_attributes(first, second),
    )


def _check_is_left_by(plan: ChannelPlan, shapes: Mapping[str, Shape]) -> None:
    left = {name: _shape_after(plan.shapes[name], axes) for name, axes in plan.kept.items()}
    left |= {name: (length,) for name, length in plan.new_biases.items()}
    for name, shape in left.items():
        if shapes.get(name) != shape:
            found = f"has shape {list(shapes[name])}" if name in shapes else "is not there"
            raise StateError(
                f"the model was pruned before, which left {name!r} of shape {list(shape)}; now it {found}. No plan leads from "
                "the unpruned model to what would be left of this one; prune a new model of this architecture that has loaded "
                "its state_dict"
            )


def _shape_after(shape: Shape, axes: Axes) -> Shape:
    return tuple(int(axes[axis].shape[-1]) if axis in axes else size for axis, size in enumerate(shape))


def _composed_axes(first: Axes, second: Axes, between: Shape) -> dict[int, Tensor]:
    made: dict[int, Tensor] = {}
    for axis in sorted(first.keys() | second.keys()):
        one, other = first.get(axis), second.get(axis)
        if one is None:
            assert other is not None
            made[axis] = other
        elif one.dim() == 1:
            made[axis] = one if other is None else one[other]
        else:
            made[axis] = _composed_rows(one, other, _groups_left(len(one), second.get(0), between[0]))
    return made


def _groups_left(groups: int, outputs: Tensor | None, rows: int) -> Tensor:
    """Which groups of a grouped convolution keep some of their outputs."""
    return torch.arange(groups) if outputs is None else (outputs // (rows // groups)).unique()


def _composed_rows(first: Tensor, second: Tensor | None, groups: Tensor) -> Tensor:
    """Indices within each group: one row for each group that stays."""
    rows = first[groups]
    if second is None:
        return rows
    # Where one group was left, its convolution was a plain one when it was cut again.
    return rows.gather(1, second.view(len(groups), -1))


def _composed_moves(first: ChannelPlan, second: ChannelPlan, name: str, shapes: Mapping[str, Shape]) -> tuple[Tensor, Tensor]:
    """What is added to a tensor after both cuts: additions of the first that are still there, and those of the second."""
    positions, values = first.moved[name]
    dense = torch.zeros(math.prod(shapes[name]), dtype=torch.float64).index_add_(0, positions, values)
    left = cut(dense.view(shapes[name]), second.kept.get(name, {})).flatten()
    touched = torch.zeros(dense.numel(), dtype=torch.bool)
    touched[positions] = True
    there = cut(touched.view(shapes[name]), second.kept.get(name, {})).flatten()
    if name in second.moved:
        positions, values = second.moved[name]
        left = left.index_add(0, positions, values)
        there[positions] = True
    found = there.nonzero().flatten()
    return found, left[found]


def _composed_attributes(first: ChannelPlan, second: ChannelPlan) -> tuple[Attribute, ...]:
    made = {(one.module, one.name): one for one in first.attributes}
    for one in second.attributes:
        key = (one.module, one.name)
        made[key] = replace(one, before=made[key].before) if key in made else one
    return tuple(one for one in made.values() if one.before != one.after)


__all__ = ["compose"]
