"""Rules for an order of channels where they differ from those for removal."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from sparsefx.passes.channel_rules import RULES
from sparsefx.passes.channels.graph import module_path
from sparsefx.passes.channels.propagation import Propagation, Rule, shape_of
from sparsefx.passes.channels.value import Value, nothing_known


def attention(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """softmax(q k^T) v: each channel of the result is a mean over one channel of the values, whatever their order in a head.

    Channels of queries and keys keep their places: no weight sums over them.
    """
    query, key, value = (propagation.value(arguments[name]) for name in ("query", "key", "value"))
    rank, shape = len(query.shape), shape_of(node)
    heads = rank - 3
    unfit = len({rank, len(key.shape), len(value.shape)}) > 1 or rank < 4 or value.varying - {heads, rank - 1}
    if unfit or shape[heads] % value.shape[heads]:
        return propagation.refuse(node, "meets channels along other axes than heads")
    told = "attention compares queries with keys"
    for operand in (query, key):
        propagation.pin(operand, told, module_path(node))
    mask = arguments.get("attn_mask")
    if mask is not None:
        propagation.pin(propagation.value(mask), "it is a mask of attention", module_path(node))
    # Grouped queries: each head of values serves several heads of queries, one after another.
    sizes = tuple(value.shape[axis] if axis in (heads, rank - 1) else 1 for axis in range(rank))
    labels = np.repeat(np.broadcast_to(value.labels, sizes), shape[heads] // value.shape[heads], axis=heads)
    return propagation.compressed(Value(shape, np.ascontiguousarray(labels), nothing_known(rank)))


ORDERING: dict[str, Rule] = {**RULES, "scaled_dot_product_attention": attention}
