"""Ops that move elements without changing them: carried out on labels and constants as on the elements themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from sparsefx.passes.channel_rules.elementwise import meet
from sparsefx.passes.channels.facts import Blocks
from sparsefx.passes.channels.graph import op_name
from sparsefx.passes.channels.propagation import Propagation, Rule, shape_of
from sparsefx.passes.channels.value import Value, Weight, spread

Array = NDArray[Any]


def reshape(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """view, reshape, flatten, unflatten and their kin: matched runs of axes are expanded only where labels vary in them."""
    value = propagation.value(arguments["self"] if "self" in arguments else arguments["input"])
    shape = shape_of(node)
    if 0 in shape:
        return propagation.refuse(node, "makes an empty tensor")
    made = Value(shape, reshaped(value.labels, value.shape, shape), reshaped(value.constant, value.shape, shape))
    return propagation.changed_shape(node, made)


def reshaped(array: Array, before: tuple[int, ...], after: tuple[int, ...]) -> Any:
    """``array``, which is broadcast to shape ``before``, for the shape ``after`` with the same elements in the same order."""
    parts: list[tuple[int, ...]] = []
    for run_before, run_after in _matched(before, after):
        if all(array.shape[axis] == 1 for axis in run_before):
            parts.append((1,) * len(run_after))
        else:
            parts.append(tuple(after[axis] for axis in run_after))
            array = spread(array, before, frozenset(run_before))
    return array.reshape(tuple(size for part in parts for size in part))


def _matched(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shortest runs of axes, from the left, that hold equally many elements."""
    runs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        first_i, first_j = i, j
        left = right = 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        # Axes of size 1 that only one side has join the run before them.
        if (first_i == i or first_j == j) and runs:
            previous_before, previous_after = runs.pop()
            runs.append(((*previous_before, *range(first_i, i)), (*previous_after, *range(first_j, j))))
        else:
            runs.append((tuple(range(first_i, i)), tuple(range(first_j, j))))
    return runs


def permute(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """permute, transpose, t and their kin; a weight stays a weight."""
    given = arguments["self"]
    rank = len(given.shape)
    order = _order(op_name(node).removesuffix("_"), arguments, rank)
    if order is None:
        return propagation.refuse(node, "has a form without a rule")
    if isinstance(given, Weight):
        return Weight(given.name, given.tensor, tuple(given.order[axis] for axis in order), given.sliceable)
    return Value(tuple(given.shape[axis] for axis in order), given.labels.transpose(order), given.constant.transpose(order))


def _order(name: str, arguments: dict[str, Any], rank: int) -> list[int] | None:
    order = list(range(rank))
    if name == "permute":
        return [axis % rank for axis in arguments["dims"]]
    if name in ("t", "numpy_T", "mT", "adjoint", "matrix_H"):
        if rank >= 2:
            order[-2], order[-1] = order[-1], order[-2]
        return order if name != "numpy_T" else list(range(rank))[::-1]
    names = {"transpose": ("dim0", "dim1"), "swapdims": ("dim0", "dim1"), "swapaxes": ("axis0", "axis1")}
    if name in names:
        first, second = (arguments[key] % max(rank, 1) for key in names[name])
        order[first], order[second] = order[second], order[first]
        return order
    if name in ("movedim", "moveaxis"):
        source, target = arguments["source"], arguments["destination"]
        source = [source] if isinstance(source, int) else source
        target = [target] if isinstance(target, int) else target
        return _moved(rank, source, target)
    return None


def _moved(rank: int, source: list[int], target: list[int]) -> list[int]:
    source, target = [axis % rank for axis in source], [axis % rank for axis in target]
    order = [axis for axis in range(rank) if axis not in source]
    for to, axis in sorted(zip(target, source, strict=True)):
        order.insert(to, axis)
    return order


def squeeze(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """squeeze and unsqueeze: axes of size 1 come and go."""
    value = propagation.value(arguments["self"])
    shape = shape_of(node)
    return Value(shape, reshaped(value.labels, value.shape, shape), reshaped(value.constant, value.shape, shape))


def expand(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """expand, expand_as, broadcast_to: repeated axes have one label."""
    shape = shape_of(node)
    return Value(shape, *_ranked(propagation.value(arguments["self"]), len(shape)))


def _ranked(value: Value, rank: int) -> tuple[Any, Any]:
    lifted = value.lifted(rank)
    return lifted.labels, lifted.constant


def expand_as(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """To the shape of another tensor, whose channels it then follows where it is repeated over them."""
    value, other = propagation.value(arguments["self"]), propagation.value(arguments["other"])
    lifted = value.lifted(len(other.shape))
    if not other.varying or other.varying & lifted.varying or any(lifted.shape[axis] != 1 for axis in other.varying):
        return expand(propagation, node, arguments)
    # One element for all channels of the other: it is needed as it is, and the copies go where those channels go.
    labels = meet(propagation, node, [other, lifted])
    return Value(shape_of(node), labels, lifted.constant)


def cat(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """cat: along its axis labels stand one after another; along others operands meet index by index."""
    given = [propagation.value(tensor) for tensor in arguments["tensors"]]
    given = [value for value in given if value.shape != (0,)]
    shape = shape_of(node)
    axis = arguments["dim"] % len(shape)
    return _joined(propagation, node, given, axis, shape)


def stack(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """stack: a new axis first, then cat."""
    shape = shape_of(node)
    axis = arguments["dim"] % len(shape)
    given = [propagation.value(tensor) for tensor in arguments["tensors"]]
    opened = [
        Value((*v.shape[:axis], 1, *v.shape[axis:]), np.expand_dims(v.labels, axis), np.expand_dims(v.constant, axis))
        for v in given
    ]
    return _joined(propagation, node, opened, axis, shape)


def _joined(propagation: Propagation, node: fx.Node, given: list[Value], axis: int, shape: tuple[int, ...]) -> Any:
    if any(len(value.shape) != len(shape) for value in given):
        return propagation.refuse(node, "joins tensors of other ranks")
    others = frozenset(axis_ for value in given for axis_ in value.varying if axis_ != axis)
    if others:
        # What stands side by side along another axis is one tensor there: index by index it stays or goes together.
        joined = spread(given[0].labels, given[0].shape, others).take([0], axis=axis)
        for value in given:
            propagation.labels.union(joined, spread(value.labels, value.shape, others))
    elif all(map(propagation.is_unknown, given)):
        # Of inputs of the model, say: all stay, and one label is enough to say so.
        joined = max((value.labels for value in given), key=np.any).reshape((1,) * len(shape))
    else:
        joined = np.concatenate([spread(value.labels, value.shape, frozenset((axis,))) for value in given], axis=axis)
        found = propagation.labels.find(joined)
        joined = joined.take([0], axis=axis) if (found == found.flat[0]).all() else joined
    constant_axes = frozenset(a for value in given for a, size in enumerate(value.constant.shape) if size > 1 or a == axis)
    constant = np.concatenate([spread(value.constant, value.shape, constant_axes) for value in given], axis=axis)
    made = Value(shape, np.ascontiguousarray(joined), constant).with_constant(constant)
    return propagation.compressed(made)


def roll(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """roll and flip: the order changes along the axes that are named, where labels or constants vary along them."""
    value = propagation.value(arguments["self"])
    axes = arguments["dims"]
    axes = [axes] if isinstance(axes, int) else list(axes)
    rank = len(value.shape)
    if not axes:
        return propagation.refuse(node, "rolls over flattened axes") if value.varying else value.forgotten()
    if op_name(node) == "flip":
        numbers = tuple(axis % rank for axis in axes)
        return Value(value.shape, np.flip(value.labels, numbers), np.flip(value.constant, numbers))
    shifts = arguments["shifts"]
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    return Value(value.shape, np.roll(value.labels, shifts, axes), np.roll(value.constant, shifts, axes))


def repeat(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """repeat and tile: labels are repeated with the elements."""
    shape = shape_of(node)
    value = propagation.value(arguments["self"]).lifted(len(shape))
    times = [new // old for new, old in zip(shape, value.shape, strict=True)]
    labels, constant = value.labels, value.constant
    for axis, number in enumerate(times):
        if number > 1:
            labels = np.concatenate([labels] * number, axis) if labels.shape[axis] > 1 else labels
            constant = np.concatenate([constant] * number, axis) if constant.shape[axis] > 1 else constant
    return propagation.changed_shape(node, Value(shape, labels, constant))


def repeat_interleave(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """repeat_interleave by one number along one axis."""
    times, axis = arguments.get("repeats"), arguments.get("dim")
    if not isinstance(times, int) or axis is None:
        return propagation.refuse(node, "repeats by a tensor, or over flattened axes")
    value = propagation.value(arguments["self"])
    axis %= len(value.shape)
    labels = np.repeat(value.labels, times, axis) if value.labels.shape[axis] > 1 else value.labels
    constant = np.repeat(value.constant, times, axis) if value.constant.shape[axis] > 1 else value.constant
    return propagation.changed_shape(node, Value(shape_of(node), labels, constant))


def pixel_shuffle(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """Each channel of the result is spread over r * r of the input, which go together."""
    value = propagation.value(arguments["self"])
    r = arguments["upscale_factor"]
    rank = len(value.shape)
    if value.varying - {rank - 3}:
        return propagation.refuse(node, "meets channels along other axes")
    channels = value.shape[rank - 3] // (r * r)
    labels = np.broadcast_to(value.labels.reshape(-1), (channels * r * r,)).reshape(channels, r * r)
    propagation.labels.union(labels, np.broadcast_to(labels[:, :1], labels.shape))
    return propagation.changed_shape(node, Value(shape_of(node), *_by_channel(value, labels[:, 0], rank, r * r)))


def channel_shuffle(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """view as groups, transpose, flatten."""
    value = propagation.value(arguments["self"])
    groups = arguments["groups"]
    split = (value.shape[0], groups, value.shape[1] // groups, *value.shape[2:])
    order = (0, 2, 1, *range(3, len(split)))
    parted = Value(split, reshaped(value.labels, value.shape, split), reshaped(value.constant, value.shape, split))
    parted = propagation.changed_shape(node, parted)
    if parted.varying == {1, 2}:
        # Their number is the op's: no group goes as a whole.
        propagation.add_blocks(Blocks(np.ascontiguousarray(parted.labels.reshape(groups, -1))))
    turned = tuple(split[axis] for axis in order)
    return Value(
        value.shape,
        reshaped(parted.labels.transpose(order), turned, value.shape),
        reshaped(parted.constant.transpose(order), turned, value.shape),
    )


def _by_channel(value: Value, labels: Array, rank: int, run: int) -> tuple[Array, Array]:
    shape = tuple(len(labels) if axis == rank - 3 else 1 for axis in range(rank))
    moved = np.moveaxis(value.constant, rank - 3, 0)
    flat = np.broadcast_to(moved.reshape(moved.shape[0], -1), (value.shape[rank - 3], moved[0].size)).reshape(len(labels), -1)
    constant = np.where((flat == flat[:, :1]).all(axis=1), flat[:, 0], np.nan)
    return labels.reshape(shape), constant.reshape(shape)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "_reshape_alias"), reshape
    ),
    **dict.fromkeys(
        ("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "numpy_T", "mT", "adjoint"), permute
    ),
    **dict.fromkeys(("squeeze", "unsqueeze"), squeeze),
    **dict.fromkeys(("expand", "broadcast_to"), expand),
    "expand_as": expand_as,
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "stack": stack,
    **dict.fromkeys(("roll", "flip"), roll),
    **dict.fromkeys(("repeat", "tile"), repeat),
    "repeat_interleave": repeat_interleave,
    "pixel_shuffle": pixel_shuffle,
    "channel_shuffle": channel_shuffle,
    "native_channel_shuffle": channel_shuffle,
}
