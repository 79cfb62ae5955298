"""Reductions over axes: without channels they keep the channels of the others, over channels they pin."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from sparsefx.passes.channel_rules.elementwise import elementwise
from sparsefx.passes.channel_rules.normalization import tied
from sparsefx.passes.channels.graph import module_path, op_name
from sparsefx.passes.channels.propagation import Propagation, Rule, shape_of
from sparsefx.passes.channels.value import Value

_KEEPING = frozenset(("mean", "amax", "amin", "logsumexp_of_one"))
_GIVING_INDICES = frozenset(("argmax", "argmin", "max", "min", "median"))


def reduction(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """sum, mean, amax, var, norm and their kin; max and min of two tensors are functions of single elements."""
    if arguments.get("other") is not None:
        return elementwise(propagation, node, arguments)
    value = propagation.value(arguments.get("self", arguments.get("x")))
    rank = len(value.shape)
    given = arguments.get("dim")
    axes = [given] if isinstance(given, int) else list(given or range(rank))
    numbers = sorted(axis % max(rank, 1) for axis in axes)
    made = node.meta["val"]
    value = tied(propagation, node, value, frozenset(numbers), ordered=op_name(node) in _GIVING_INDICES)
    if not value.varying:
        propagation.pin(value, f"{op_name(node)} reads it", module_path(node))
    if isinstance(made, (tuple, list)):
        return _several(node, value, numbers)
    return _reduced(node, value, numbers, shape_of(node))


def _several(node: fx.Node, value: Value, numbers: list[int]) -> Any:
    return tuple(_reduced(node, value.forgotten(), numbers, tuple(int(size) for size in part.shape)) for part in node.meta["val"])


def _reduced(node: fx.Node, value: Value, numbers: list[int], shape: tuple[int, ...]) -> Value:
    labels, constant = value.labels, value.constant
    for axis in numbers:
        labels = labels.take([0], axis=axis)
        first = constant.take([0], axis=axis)
        constant = np.where((constant == first).all(axis=axis, keepdims=True), first, np.nan)
    name = op_name(node)
    uneven = constant if name == "sum" and not value.varying & set(numbers) else None
    if name == "sum":
        # As many times the constant as there are places, and another input may have others.
        constant = np.where(constant == 0, 0.0, np.nan)
    elif name not in _KEEPING:
        constant = np.full_like(constant, np.nan)
    if value.varying & set(numbers):
        labels = np.zeros_like(labels)
    if len(shape) < len(value.shape):
        labels, constant = labels.squeeze(tuple(numbers)), constant.squeeze(tuple(numbers))
        uneven = None if uneven is None else uneven.squeeze(tuple(numbers))
    return Value(shape, labels, constant, uneven)


RULES: dict[str, Rule] = dict.fromkeys(
    (
        *("sum", "mean", "amax", "amin", "prod", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "all", "any"),
        *("argmax", "argmin", "max", "min", "median", "var_mean", "std_mean", "count_nonzero", "frobenius_norm"),
    ),
    reduction,
)
