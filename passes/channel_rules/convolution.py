"""Convolutions: products that sum over channels, place by place."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from sparsefx.passes.channel_rules.products import add_product, sums_of
from sparsefx.passes.channels.facts import Blocks, Read
from sparsefx.passes.channels.graph import module_path, op_name
from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.propagation import Propagation, Rule, shape_of
from sparsefx.passes.channels.value import Floats, Value, Weight, along, constant_along, constants_read


def convolution(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """conv1d to conv3d, conv_transpose1d to 3d, and aten.convolution."""
    value = propagation.value(arguments["input"])
    weight, bias = arguments["weight"], arguments["bias"]
    if not isinstance(weight, Weight) or weight.order != tuple(range(weight.tensor.dim())) or not weight.sliceable:
        return propagation.refuse(node, "has a weight that is computed, which cannot be cut")
    if bias is not None and not isinstance(bias, Weight):
        return propagation.refuse(node, "has a bias that is computed, which cannot be cut")
    if len(value.shape) != weight.tensor.dim():
        return propagation.refuse(node, "was given an input without a batch axis")
    if value.varying - {1}:
        return propagation.refuse(node, "meets channels along other axes than its own")
    transposed = bool(arguments.get("transposed")) or op_name(node).startswith("conv_transpose")
    groups = arguments["groups"]
    into = along(value.labels, 1, value.shape[1])
    constant, uniform = constant_along(value, 1), not transposed and not _pads(arguments)
    if groups == 1:
        constant, uniform = constants_read(value, 1, uniform=uniform)
    if groups > 1 and groups == value.shape[1] and shape_of(node)[1] == groups:
        return _depthwise(propagation, node, value, weight, bias, uniform=uniform)
    if groups > 1:
        if transposed:
            return propagation.refuse(node, "is transposed and grouped")
        return _grouped(propagation, node, into, constant, weight, bias, groups, uniform=uniform)
    return add_product(
        propagation,
        node,
        axis=1,
        into=into,
        constant=constant,
        weight=weight,
        out_axis=1 if transposed else 0,
        in_axis=0 if transposed else 1,
        bias=bias,
        uniform=uniform,
    )


def _pads(arguments: dict[str, Any]) -> bool:
    padding = arguments["padding"]
    if isinstance(padding, str):
        return padding != "valid" and any(size > 1 for size in arguments["weight"].shape[2:])
    return any(amount != 0 for amount in (padding if isinstance(padding, (list, tuple)) else [padding]))


def _depthwise(
    propagation: Propagation, node: fx.Node, value: Value, weight: Weight, bias: Weight | None, *, uniform: bool
) -> Value:
    """One filter a channel: input and output channel are one."""
    size = value.shape[1]
    out = propagation.axis(weight, 0)
    propagation.labels.union(along(value.labels, 1, size), out)
    propagation.count(node, weight, size)
    known = constant_along(value, 1)
    # float64 before the sum: what is folded later is evaluated like this too.
    filters = weight.tensor.double().reshape(size, -1)
    added = (filters.sum(1)).cpu().numpy()
    empty = (filters == 0).all(dim=1).cpu().numpy()
    carried = known if uniform else np.where(known == 0, 0.0, np.nan)
    made = np.where(empty, 0.0, carried * added)
    if bias is not None:
        propagation.labels.union(out, propagation.axis(bias, 0))
        made = made + bias.tensor.double().cpu().numpy()
    return _channels(shape_of(node), out, made)


def _grouped(
    propagation: Propagation,
    node: fx.Node,
    into: Integers,
    constant: Floats,
    weight: Weight,
    bias: Weight | None,
    groups: int,
    *,
    uniform: bool,
) -> Any:
    """In each group equally many inputs stay, and equally many outputs; or a whole group goes with both."""
    out = propagation.axis(weight, 0)
    rows, columns = out.reshape(groups, -1), np.array(into).reshape(groups, -1)
    if weight.name in propagation.facts.gathered:
        propagation.labels.union(propagation.facts.gathered[weight.name][1], columns)
    propagation.facts.gathered[weight.name] = (rows, columns)
    propagation.add_blocks(Blocks(rows, columns))
    propagation.add_blocks(Blocks(columns, rows))
    if bias is not None:
        propagation.labels.union(out, propagation.axis(bias, 0))
    read = Read(module_path(node), weight, 0, 1, groups, out, np.array(into), constant, uniform, bias)
    propagation.add_read(read, node)
    return _channels(shape_of(node), out, sums_of(read))


def _channels(shape: tuple[int, ...], labels: Integers, constant: Floats) -> Value:
    sizes = tuple(shape[1] if axis == 1 else 1 for axis in range(len(shape)))
    return Value(shape, labels.reshape(sizes), constant.reshape(sizes)).with_constant(constant.reshape(sizes))


RULES: dict[str, Rule] = dict.fromkeys(
    ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "_convolution"),
    convolution,
)
