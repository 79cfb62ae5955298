"""Scaled dot product attention: whole heads stay or go."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from sparsefx.passes.channels.facts import Heads
from sparsefx.passes.channels.graph import module_path
from sparsefx.passes.channels.propagation import Propagation, Rule, shape_of
from sparsefx.passes.channels.value import Value, Weight, constant_along, nothing_known


def attention(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """softmax(q k^T) v: queries, keys and values of a head are one class.

    The scale depends on the head's size, so that nothing inside a head can go. A head whose values are the same at all places
    gives these, since softmax sums to one; behind a mask, which may leave no place, or with dropout, only zero gives zero.
    """
    query, key, value = (propagation.value(arguments[name]) for name in ("query", "key", "value"))
    rank = len(query.shape)
    shape = shape_of(node)
    if len({rank, len(key.shape), len(value.shape)}) > 1 or rank < 3:
        return propagation.refuse(node, "has operands of other ranks")
    heads = rank - 3
    if rank == 3 or any(operand.varying - {heads, rank - 1} for operand in (query, key, value)):
        return propagation.refuse(node, "meets channels along other axes than heads")
    number = query.shape[heads]
    labels = None
    for operand in (query, key, value):
        if operand.shape[heads] == 1 and number > 1:
            propagation.pin(operand, "it is one head for all queries", module_path(node))
            continue
        rows = np.moveaxis(operand.labels, heads, 0).reshape(operand.labels.shape[heads], -1)
        rows = np.broadcast_to(rows, (operand.shape[heads], rows.shape[1]))
        # Grouped queries: each head of keys and values serves several heads of queries, one after another.
        rows = np.repeat(rows, number // operand.shape[heads], axis=0)
        labels = rows[:, :1] if labels is None else labels
        propagation.labels.union(np.broadcast_to(labels, rows.shape), rows)
    assert labels is not None
    for operand in (query, key):
        own = np.ascontiguousarray(labels[:: number // operand.shape[heads], 0])
        propagation.facts.heads.append(Heads(module_path(node), own, query.shape[-1]))
    mask = arguments.get("attn_mask")
    if isinstance(mask, (Value, Weight)):
        lifted = propagation.value(mask).lifted(rank)
        if lifted.shape[heads] == number > 1:
            # A bias of positions for each head goes with its head.
            rows = np.moveaxis(lifted.labels, heads, 0).reshape(lifted.labels.shape[heads], -1)
            propagation.labels.union(labels, np.broadcast_to(rows, (number, rows.shape[1])))
        else:
            propagation.pin(lifted, "it is a mask of attention", module_path(node))
    sizes = tuple(number if axis == heads else 1 for axis in range(rank))
    if mask is None and not arguments.get("dropout_p") and value.constant.shape[rank - 2] == 1:
        times = number // value.shape[heads]
        constant = value.constant if value.constant.shape[heads] == 1 else np.repeat(value.constant, times, axis=heads)
    else:
        zero = np.repeat(constant_along(value, heads) == 0, number // value.shape[heads])
        constant = np.where(zero, 0.0, np.nan).reshape(sizes) if zero.any() else nothing_known(rank)
    return Value(shape, np.ascontiguousarray(labels[:, 0]).reshape(sizes), constant)


RULES: dict[str, Rule] = {"scaled_dot_product_attention": attention}
