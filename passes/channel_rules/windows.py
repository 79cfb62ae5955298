"""Ops that gather places of an image into windows or scatter them back: every place of a channel is that channel's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from sparsefx.passes.channels.graph import module_path
from sparsefx.passes.channels.propagation import Propagation, Rule, shape_of
from sparsefx.passes.channels.value import Floats, Value, along, constant_along


def unfold(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """Tensor.unfold: windows along an axis without channels, with a new axis for the places in a window."""
    value = propagation.value(arguments["self"])
    axis = arguments["dimension"] % max(1, len(value.shape))
    if not value.shape or axis in value.varying:
        return propagation.refuse(node, "takes windows of channels")
    first = value.constant.take([0], axis=axis)
    same = np.where((value.constant == first).all(axis=axis, keepdims=True), first, np.nan)
    return Value(shape_of(node), value.labels[..., None], value.constant[..., None]).with_constant(same[..., None])


def im2col(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """nn.Unfold: [B, C, H, W] to [B, C * places of a window, windows]."""
    value = propagation.value(arguments["self"])
    if len(value.shape) != 4 or value.varying - {1}:
        return propagation.refuse(node, "meets channels along other axes than its own")
    places = math.prod(arguments["kernel_size"])
    constant = constant_along(value, 1)
    # The border is padded with zeros.
    constant = np.where(constant == 0, 0.0, np.nan) if any(arguments["padding"]) else constant
    labels = along(value.labels, 1, value.shape[1])
    return propagation.changed_shape(node, _by_axis(shape_of(node), 1, np.repeat(labels, places), np.repeat(constant, places)))


def col2im(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """nn.Fold: sums of windows; the places of a window belong to one channel."""
    value = propagation.value(arguments["self"])
    if len(value.shape) != 3 or value.varying - {1}:
        return propagation.refuse(node, "meets channels along other axes than its own")
    places = math.prod(arguments["kernel_size"])
    rows = along(value.labels, 1, value.shape[1]).reshape(-1, places)
    propagation.labels.union(rows, np.broadcast_to(rows[:, :1], rows.shape))
    # Windows overlap, here more and there less, so that only zero stays the same everywhere.
    zero = (constant_along(value, 1) == 0).reshape(-1, places).all(axis=1)
    return propagation.changed_shape(node, _by_axis(shape_of(node), 1, rows[:, 0], np.where(zero, 0.0, np.nan)))


def pixel_unshuffle(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """Each channel becomes r * r of them, which go together."""
    value = propagation.value(arguments["self"])
    axis = len(value.shape) - 3
    if value.varying - {axis}:
        return propagation.refuse(node, "meets channels along other axes than its own")
    places = arguments["downscale_factor"] ** 2
    labels = np.repeat(along(value.labels, axis, value.shape[axis]), places)
    return propagation.changed_shape(node, _by_axis(shape_of(node), axis, labels, np.repeat(constant_along(value, axis), places)))


def grid_sampler(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """grid_sample: places between places; outside of the image are zeros, unless its border is repeated or reflected."""
    value = propagation.value(arguments["input"])
    if value.varying - {1}:
        return propagation.refuse(node, "meets channels along other axes than its own")
    propagation.pin(arguments["grid"], "grid_sampler takes it for places", module_path(node))
    constant = constant_along(value, 1)
    known = constant if arguments["padding_mode"] else np.where(constant == 0, 0.0, np.nan)
    return _by_axis(shape_of(node), 1, along(value.labels, 1, value.shape[1]), known)


def _by_axis(shape: tuple[int, ...], axis: int, labels: Any, constant: Floats) -> Value:
    """A value whose labels and constants vary along one axis."""
    sizes = tuple(size if number == axis else 1 for number, size in enumerate(shape))
    return Value(shape, labels.reshape(sizes), constant.reshape(sizes)).with_constant(constant.reshape(sizes))


RULES: dict[str, Rule] = {
    "unfold": unfold,
    "im2col": im2col,
    "col2im": col2im,
    "pixel_unshuffle": pixel_unshuffle,
    **dict.fromkeys(("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"), grid_sampler),
}
