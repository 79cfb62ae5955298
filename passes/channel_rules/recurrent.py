"""Recurrent layers: the first layer reads channels like a linear layer; hidden states stay whole."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from sparsefx.passes.channels.facts import Read
from sparsefx.passes.channels.graph import module_path, op_name
from sparsefx.passes.channels.propagation import Propagation, Rule
from sparsefx.passes.channels.value import Weight, along, constant_along


def recurrent(propagation: Propagation, node: fx.Node, arguments: dict[str, Any]) -> Any:
    """lstm, gru, rnn_tanh, rnn_relu of a padded batch."""
    weights = arguments.get("params")
    value = propagation.value(arguments["input"])
    last = len(value.shape) - 1
    if "data" in arguments or not isinstance(weights, (list, tuple)) or not all(isinstance(weight, Weight) for weight in weights):
        return propagation.refuse(node, "has a form without a rule")
    if value.varying - {last} or arguments["train"]:
        return propagation.refuse(node, "meets channels along other axes than its own, or drops some in training")
    into, constant = along(value.labels, last, value.shape[last]), constant_along(value, last)
    per_direction = len(weights) // (arguments["num_layers"] * (2 if arguments["bidirectional"] else 1))
    first = [weights[number * per_direction] for number in range(2 if arguments["bidirectional"] else 1)]
    for number, weight in enumerate(first):
        bias = weights[number * per_direction + 2] if arguments["has_biases"] else None
        propagation.labels.union(into, propagation.axis(weight, 1))
        read = Read(module_path(node), weight, 0, 1, 1, propagation.axis(weight, 0), np.array(into), constant, True, bias)
        propagation.add_read(read, node)
    for weight in weights:
        for axis in range(weight.tensor.dim()):
            if not (axis == 1 and any(weight is one for one in first)):
                propagation.pin_labels(
                    propagation.axis(weight, axis), f"it is the hidden state of {op_name(node)}", module_path(node)
                )
    states: Any = arguments["hx"]
    for state in states if isinstance(states, (list, tuple)) else [states]:
        propagation.pin(state, f"it is the first state of {op_name(node)}", module_path(node))
    return propagation.unknown_of(node)


RULES: dict[str, Rule] = dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent)
