"""Products with a weight that sum over the last axis: linear, addmm, matmul with a parameter; and embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from sparsefx.passes.channel_rules import contraction
from sparsefx.passes.channel_rules.contraction import contract
from sparsefx.passes.channel_rules.elementwise import meet
from sparsefx.passes.channels.facts import Read
from sparsefx.passes.channels.graph import module_path, op_name
from sparsefx.passes.channels.labels import Integers
from sparsefx.passes.channels.propagation import Propagation, Rule, shape_of
from sparsefx.passes.channels.value import Floats, Value, Weight, along, constants_read, nothing_known

_ROWS = 256


def linear(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """``x @ w.T + b``."""
    weight = arguments["weight"]
    if not isinstance(weight, Weight) or weight.tensor.dim() != 2:
        return propagation.refuse(node, "has a weight that is computed, which cannot be cut")
    turned = Weight(weight.name, weight.tensor, weight.order[::-1], weight.sliceable)
    return _product(propagation, node, propagation.value(arguments["input"]), turned, arguments["bias"])


def addmm(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """``bias + x @ w``, as transformers' Conv1D has it."""
    weight, bias = arguments["mat2"], arguments["self"]
    plain = arguments["beta"] == 1 and arguments["alpha"] == 1
    if not plain or not isinstance(weight, Weight) or not isinstance(bias, Weight) or bias.tensor.dim() != 1:
        return propagation.refuse(node, "has a form without a rule")
    return _product(propagation, node, propagation.value(arguments["mat1"]), weight, bias)


def matmul(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """matmul, mm, bmm: with a two-dimensional parameter at the right a layer, else a contraction of two values."""
    first, second = arguments["self"], arguments.get("other", arguments.get("mat2"))
    if isinstance(second, Weight) and second.tensor.dim() == 2 and second.sliceable and len(first.shape) >= 1:
        return _product(propagation, node, propagation.value(first), second, None)
    left, right = propagation.value(first), propagation.value(second)
    if len(left.shape) < 2 or len(right.shape) < 2:
        return propagation.refuse(node, "has a form without a rule")
    rank = max(len(left.shape), len(right.shape))
    batch = "".join(chr(ord("a") + number) for number in range(rank - 2))
    return contract(
        propagation,
        node,
        (left.lifted(rank), right.lifted(rank)),
        (f"{batch}ik", f"{batch}kj"),
        f"{batch}ij",
    )


def baddbmm(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """``beta * self + alpha * batch1 @ batch2``."""
    operands = (propagation.value(arguments["batch1"]), propagation.value(arguments["batch2"]))
    product = contract(propagation, node, operands, ("aik", "akj"), "aij")
    if arguments["beta"] == 0:
        return product
    added = propagation.value(arguments["self"])
    labels = meet(propagation, node, [product, added])
    return propagation.compressed(Value(shape_of(node), labels, nothing_known(3)))


def _product(propagation: Propagation, node: fx.Node, value: Value, weight: Weight, bias: Any) -> Any:
    """A weight in the order [in, out] behind the last axis."""
    if not weight.sliceable:
        return propagation.refuse(node, "has a weight that is no parameter")
    if bias is not None and not isinstance(bias, Weight):
        return propagation.refuse(node, "has a bias that is computed, which cannot be cut")
    last = len(value.shape) - 1
    if value.varying - {last}:
        return propagation.refuse(node, "meets channels along other axes than its own")
    constant, uniform = constants_read(value, last, uniform=True)
    return add_product(
        propagation,
        node,
        axis=len(shape_of(node)) - 1,
        into=along(value.labels, last, value.shape[last]),
        constant=constant,
        weight=weight,
        out_axis=weight.order[1],
        in_axis=weight.order[0],
        bias=bias,
        uniform=uniform,
    )


def add_product(
    propagation: Propagation,
    node: fx.Node,
    *,
    axis: int,
    into: Integers,
    constant: Floats,
    weight: Weight,
    out_axis: int,
    in_axis: int,
    bias: Weight | None,
    uniform: bool,
) -> Value:
    """Note a product without groups, and give its result, whose channels stand along ``axis``."""
    out = propagation.axis(weight, out_axis)
    propagation.labels.union(into, propagation.axis(weight, in_axis))
    if bias is not None:
        propagation.labels.union(out, propagation.axis(bias, 0))
    read = Read(module_path(node), weight, out_axis, in_axis, 1, out, np.array(into), constant, uniform, bias)
    propagation.add_read(read, node, axis=axis)
    shape = shape_of(node)
    sizes = tuple(len(out) if number == axis else 1 for number in range(len(shape)))
    return Value(shape, out.reshape(sizes), np.zeros(sizes)).with_constant(sums_of(read).reshape(sizes))


def sums_of(read: Read) -> Floats:
    """The constant of each output channel, NaN where it depends on an input that is none; float64, shape [K]."""
    known = read.constant if read.uniform else np.where(read.constant == 0, 0.0, np.nan)
    weight = matrix(read)
    rows, inside = weight.shape[0], weight.shape[1]
    by_group = known.reshape(read.groups, inside)
    made = np.zeros(rows)
    for group in range(read.groups):
        part = slice(group * rows // read.groups, (group + 1) * rows // read.groups)
        free = np.isnan(by_group[group])
        depends = _reads_any(weight[part], free)
        made[part] = np.where(depends, np.nan, 0.0)
        moved = ~free & (by_group[group] != 0)
        still = np.flatnonzero(~depends)
        if moved.any() and len(still):
            made[part.start + still] += weighted(weight[part][torch.from_numpy(still)], moved, by_group[group][moved])
    if read.bias is not None:
        made = made + read.bias.tensor.double().cpu().numpy()
    return made


def matrix(read: Read) -> Tensor:
    """The weight as [K, C, places]: outputs, inputs of a group, everything else."""
    moved = read.weight.tensor.movedim((read.out_axis, read.in_axis), (0, 1))
    return moved.flatten(2) if moved.dim() > 2 else moved.unsqueeze(2)


def weighted(weight: Tensor, columns: NDArray[np.bool_], constants: Floats) -> Floats:
    """Sum over these columns and all places of weight times constant, in float64; shape [rows]."""
    factors = torch.from_numpy(np.ascontiguousarray(constants)).to(weight.device)
    chosen = torch.from_numpy(np.flatnonzero(columns)).to(weight.device)
    parts = [
        (weight[start : start + _ROWS].index_select(1, chosen).double().sum(2) @ factors).cpu().numpy()
        for start in range(0, weight.shape[0], _ROWS)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def _reads_any(weight: Tensor, columns: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which rows have a weight other than zero in one of these columns."""
    if not columns.any():
        return np.zeros(weight.shape[0], dtype=bool)
    chosen = None if columns.all() else torch.from_numpy(np.flatnonzero(columns)).to(weight.device)
    parts = []
    for start in range(0, weight.shape[0], _ROWS):
        block = weight[start : start + _ROWS]
        block = block if chosen is None else block.index_select(1, chosen)
        parts.append((block != 0).flatten(1).any(dim=1).cpu().numpy())
    return np.concatenate(parts)


def embedding(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """A table looked up by an input: its columns are channels, its rows stay."""
    weight, indices = arguments["weight"], arguments["indices"]
    if not isinstance(weight, Weight) or weight.order != (0, 1):
        return propagation.refuse(node, "has a table that is computed")
    propagation.pin(indices, f"{op_name(node)} takes it for indices", module_path(node))
    if weight.sliceable:
        propagation.pin_labels(propagation.axis(weight, 0), "it is the vocabulary of an embedding", module_path(node))
    shape = shape_of(node)
    sizes = tuple(shape[-1] if axis == len(shape) - 1 else 1 for axis in range(len(shape)))
    table = weight.tensor
    same = (table == table[:1]).all(dim=0).cpu().numpy()
    constant = np.where(same, table[0].double().cpu().numpy(), np.nan)
    return Value(shape, propagation.axis(weight, 1).reshape(sizes), constant.reshape(sizes)).with_constant(
        constant.reshape(sizes)
    )


RULES: dict[str, Rule] = {
    "linear": linear,
    "addmm": addmm,
    **dict.fromkeys(("matmul", "mm", "bmm"), matmul),
    "baddbmm": baddbmm,
    "embedding": embedding,
    **contraction.RULES,
}
