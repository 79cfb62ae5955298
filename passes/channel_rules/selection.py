"""Ops that take parts of a tensor or put it into a larger one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from sparsefx.passes.channel_rules.elementwise import meet
from sparsefx.passes.channels.facts import Blocks, Split
from sparsefx.passes.channels.graph import module_path, op_name
from sparsefx.passes.channels.labels import PINNED
from sparsefx.passes.channels.propagation import Propagation, Rule, shape_of
from sparsefx.passes.channels.value import Floats, Value, Weight, along, shrunk


def take(value: Value, axis: int, part: Any, *, keep: bool = True) -> Value:
    """Indices of one axis: ``part`` is a slice or an array of integers; without ``keep`` it has one, and the axis goes."""
    labels, constant = value.labels, value.constant
    numbers = np.arange(value.shape[axis])[part]
    size = len(numbers)
    labels = labels.take(numbers, axis=axis) if labels.shape[axis] > 1 else labels
    constant = constant.take(numbers, axis=axis) if constant.shape[axis] > 1 else constant
    shape = (*value.shape[:axis], size, *value.shape[axis + 1 :])
    if keep:
        return Value(shape, labels, shrunk(constant))
    return Value((*shape[:axis], *shape[axis + 1 :]), labels.squeeze(axis), shrunk(constant.squeeze(axis)))


def select(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """One index of an axis."""
    value = propagation.value(arguments["self"])
    axis = arguments["dim"] % len(value.shape)
    index = arguments["index"]
    if not isinstance(index, int):
        return propagation.refuse(node, "takes an index that is not a number")
    index %= value.shape[axis]
    made = take(value, axis, slice(index, index + 1), keep=False)
    return _looked_up(propagation, node, value, axis, made) if propagation.is_stored(node.args[0]) else made


def slice_(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """A range of an axis. Bounds that code has as numbers are found out by running what is left."""
    value = propagation.value(arguments["self"])
    axis = arguments["dim"] % len(value.shape)
    start, end, step = arguments.get("start"), arguments.get("end"), arguments.get("step", 1)
    if op_name(node) == "narrow":
        start, end, step = arguments["start"], arguments["start"] + arguments["length"], 1
    if not all(bound is None or isinstance(bound, int) for bound in (start, end, step)):
        return propagation.refuse(node, "takes bounds that are not numbers")
    part = slice(start, end, step)
    if part.indices(value.shape[axis]) == (0, value.shape[axis], 1):
        return value
    made = take(value, axis, part)
    if made.shape != shape_of(node):
        return propagation.refuse(node, "has a form without a rule")
    if value.labels.shape[axis] > 1:
        propagation.facts.views.append((module_path(node), value.labels))
    return _looked_up(propagation, node, value, axis, made) if propagation.is_stored(node.args[0]) else made


def _looked_up(propagation: Propagation, node: fx.Node, value: Value, axis: int, made: Value) -> Value:
    """A part of what is stored, or computed from that alone, such as positions, masks or a task's row: another input takes
    other parts, so that these stay together, and what is constant is so in all of them."""
    if value.labels.shape[axis] > 1:
        propagation.labels.union(value.labels, value.labels.take([0], axis=axis))
    if value.constant.shape[axis] == 1:
        return made
    first = value.constant.take([0], axis=axis)
    same = np.where((value.constant == first).all(axis=axis, keepdims=True), first, np.nan)
    same = same if made.constant.ndim == same.ndim else same.squeeze(axis)
    return made.with_constant(np.broadcast_to(same, made.constant.shape) if made.constant.size > 1 else same)


def split(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """split, split_with_sizes, chunk, tensor_split: parts of an axis; of equal parts equally many channels stay."""
    value = propagation.value(arguments["self"])
    axis = arguments["dim"] % len(value.shape)
    sizes = [int(part.shape[axis]) for part in node.meta["val"]]
    ends = np.cumsum(sizes)
    if value.labels.shape[axis] > 1:
        propagation.facts.views.append((module_path(node), value.labels))
        if len(value.varying) == 1:
            labels = along(value.labels, axis, value.shape[axis])
            propagation.facts.splits.append(Split(module_path(node), tuple(np.split(labels, ends[:-1]))))
            if len(sizes) > 1 and len(set(sizes)) == 1:
                propagation.add_blocks(Blocks(labels.reshape(len(sizes), -1)))
    made = tuple(take(value, axis, slice(end - size, end)) for size, end in zip(sizes, ends.tolist(), strict=True))
    return _parts(propagation, node, value, axis, made)


def glu(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """The first half of an axis times the sigmoid of the second: equally many channels stay of both."""
    value = propagation.value(arguments["self"])
    axis = arguments["dim"] % len(value.shape)
    half = value.shape[axis] // 2
    left, gate = take(value, axis, slice(0, half)), take(value, axis, slice(half, 2 * half))
    if value.labels.shape[axis] > 1:
        propagation.facts.views.append((module_path(node), value.labels))
    labels = meet(propagation, node, [left, gate])
    made = left.constant / (1 + np.exp(-gate.constant))
    return propagation.compressed(Value(shape_of(node), labels, shrunk(np.where(left.constant == 0, 0.0, made))))


def unbind(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """Every index of an axis, one by one."""
    value = propagation.value(arguments["self"])
    axis = arguments["dim"] % len(value.shape)
    made = tuple(take(value, axis, slice(index, index + 1), keep=False) for index in range(value.shape[axis]))
    return _parts(propagation, node, value, axis, made)


def _parts(propagation: Propagation, node: fx.Node, value: Value, axis: int, made: tuple[Value, ...]) -> tuple[Value, ...]:
    """All parts of a tensor; of what is stored, parts that nothing reads are those that another input takes."""
    read = {user.args[1] for user in node.users if user.users}
    if len(read) == len(made) or not propagation.is_stored(node.args[0]):
        return made
    return tuple(_looked_up(propagation, node, value, axis, part) for part in made)


def getitem(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """One of several results of an op."""
    return arguments["0"][arguments["1"]]


def index(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """index and index_select along one axis: literally where the indices are a constant of the model, or no labels vary there."""
    given: list[Any] = list(arguments.get("indices") or [])
    if "index" in arguments:
        given = [None] * (arguments["dim"] % len(arguments["self"].shape)) + [arguments["index"]]
    named = [axis for axis, indices in enumerate(given) if indices is not None]
    value = propagation.value(arguments["self"])
    for axis in named:
        propagation.pin(given[axis], f"{op_name(node)} takes it for indices", module_path(node))
    if any(source.meta["val"].dtype == torch.bool for source in node.all_input_nodes[1:]):
        return propagation.refuse(node, "takes elements by a mask")
    if len(named) != 1:
        # Side by side their axes become one run of axes; apart they move to the front.
        beside = bool(named) and named == list(range(named[0], named[-1] + 1)) and not value.varying & set(named)
        return _around(node, value, named) if beside else propagation.refuse(node, "takes indices of several axes")
    axis, indices = named[0], given[named[0]]
    if value.labels.shape[axis] == 1:
        return _around(node, value, named)
    if not isinstance(indices, Weight) or indices.tensor.is_floating_point() or indices.tensor.device.type == "meta":
        return propagation.refuse(node, "takes channels by indices that are not constant")
    numbers = indices.tensor
    flat = take(value, axis, numbers.cpu().numpy().reshape(-1) % value.shape[axis])
    if not indices.sliceable and propagation.is_stored(node.args[0]):
        # Numbers that code has, for all it shows, depend on its inputs.
        flat = _looked_up(propagation, node, value, axis, flat)
    propagation.facts.views.append((module_path(node), value.labels))
    if numbers.dim() == 1:
        return propagation.compressed(flat)
    shape = shape_of(node)
    within = tuple(numbers.shape)
    labels = flat.labels.reshape((*flat.labels.shape[:axis], *within, *flat.labels.shape[axis + 1 :]))
    few = (1,) * len(within)
    constant = flat.constant.reshape(
        (*flat.constant.shape[:axis], *(few if flat.constant.shape[axis] == 1 else within), *flat.constant.shape[axis + 1 :])
    )
    return propagation.compressed(Value(shape, labels, constant))


def _around(node: fx.Node, value: Value, named: list[int]) -> Value:
    """The result of indices along axes without labels: these axes become those of the indices."""
    shape = shape_of(node)
    first, last = named[0], named[-1]
    new = len(shape) - (len(value.shape) - len(named))
    labels = value.labels.reshape((*value.labels.shape[:first], *(1,) * new, *value.labels.shape[last + 1 :]))
    if any(value.constant.shape[axis] > 1 for axis in named):
        return Value(shape, labels, np.full((1,) * len(shape), np.nan))
    constant = value.constant.reshape((*value.constant.shape[:first], *(1,) * new, *value.constant.shape[last + 1 :]))
    return Value(shape, labels, constant)


def gather(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """Elements by indices along an axis without channels."""
    value = propagation.value(arguments["self"])
    if value.varying or not value.shape:
        return propagation.refuse(node, "takes elements by indices")
    propagation.pin(arguments["index"], "gather takes it for indices", module_path(node))
    same = value.constant if value.constant.size == 1 else np.full((1,) * len(value.shape), np.nan)
    return Value(shape_of(node), value.labels, same)


def pad(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """Padding: with values of its own it makes new elements, pinned where they are channels; reflected ones are no news."""
    value = propagation.value(arguments["self"])
    rank = len(value.shape)
    amounts = list(arguments.get("pad") or arguments.get("padding") or [])
    mode = arguments.get("mode") or "constant"
    if op_name(node) not in ("pad", "constant_pad_nd"):
        mode = op_name(node)
    fill = float(arguments.get("value") or 0.0)
    labels, constant = value.labels, value.constant
    # Amounts that add nothing were computed from sizes, and are others for other inputs.
    computed = mode == "constant" and bool(amounts) and all(amount <= 0 for amount in amounts)
    uneven = _with_border(value, len(amounts) // 2, fill) if mode == "constant" else None
    for number in range(len(amounts) // 2):
        axis = rank - 1 - number
        before, after = amounts[2 * number], amounts[2 * number + 1]
        if not (before or after or computed):
            continue
        if labels.shape[axis] > 1:
            if not (before or after):
                continue
            if mode != "constant":
                return propagation.refuse(node, "reflects channels")
            labels = _cropped_or_grown(labels, axis, before, after, PINNED)
            constant = np.repeat(constant, value.shape[axis], axis) if constant.shape[axis] == 1 else constant
            constant = _cropped_or_grown(constant, axis, before, after, fill)
            propagation.facts.views.append((module_path(node), value.labels))
        elif mode == "constant" and (before > 0 or after > 0 or computed):
            # The border differs from the inside, but where the inside is what is padded with.
            inside = constant if constant.shape[axis] == 1 else constant.take([0], axis=axis)
            same = (
                inside if constant.shape[axis] == 1 else np.where((constant == inside).all(axis, keepdims=True), inside, np.nan)
            )
            constant = np.where(same == fill, same, np.nan)
        elif constant.shape[axis] > 1:
            constant = np.where(
                (constant == constant.take([0], axis=axis)).all(axis, keepdims=True), constant.take([0], axis=axis), np.nan
            )
    return Value(shape_of(node), labels, shrunk(constant), uneven)


def _with_border(value: Value, axes: int, fill: float) -> Floats | None:
    """Constants that are zero at a border and what they were inside, alike for all channels: up to that they are known."""
    constant = value.constant if value.uneven is None else value.uneven
    last = range(len(value.shape) - axes, len(value.shape))
    if fill != 0 or np.isnan(constant).all() or any(constant.shape[axis] > 1 or value.labels.shape[axis] > 1 for axis in last):
        return None
    return constant


def _cropped_or_grown(array: Any, axis: int, before: int, after: int, fill: float) -> Any:
    part = array[(slice(None),) * axis + (slice(max(0, -before), array.shape[axis] - max(0, -after)),)]
    widths = [(max(0, before), max(0, after)) if number == axis else (0, 0) for number in range(array.ndim)]
    return np.pad(part, widths, constant_values=fill)


def scatter_part(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """slice_scatter and select_scatter: a part of a tensor is replaced, along an axis without channels."""
    value, part = propagation.value(arguments["self"]), propagation.value(arguments["src"])
    axis = arguments["dim"] % len(value.shape)
    if value.labels.shape[axis] > 1:
        return propagation.refuse(node, "writes into a range of channels")
    if op_name(node) == "select_scatter":
        part = Value(
            (*part.shape[:axis], 1, *part.shape[axis:]), np.expand_dims(part.labels, axis), np.expand_dims(part.constant, axis)
        )
    if part.labels.shape[axis] > 1:
        return propagation.refuse(node, "writes channels along another axis")
    labels = meet(propagation, node, [value, Value(value.shape, part.labels, part.constant)])
    return propagation.compressed(Value(value.shape, labels, np.full((1,) * len(value.shape), np.nan)))


RULES: dict[str, Rule] = {
    "select": select,
    **dict.fromkeys(("slice", "narrow"), slice_),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"), split),
    "glu": glu,
    "unbind": unbind,
    "getitem": getitem,
    **dict.fromkeys(("index", "index_select"), index),
    "gather": gather,
    **dict.fromkeys(
        (
            "pad",
            "constant_pad_nd",
            "reflection_pad1d",
            "reflection_pad2d",
            "reflection_pad3d",
            "replication_pad1d",
            "replication_pad2d",
            "replication_pad3d",
        ),
        pad,
    ),
    **dict.fromkeys(("slice_scatter", "select_scatter"), scatter_part),
}
