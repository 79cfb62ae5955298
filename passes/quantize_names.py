"""Make a graph fit for onnxruntime's quantiser, which takes nodes by name and lets its own values replace others of their names.

It calls the scale of a value ``x`` ``x_scale``, whether or not the graph has such a value, and sets the ``beta`` of each Gemm to
one, which is right only for the biases that it rounds to whole numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from sparsefx.passes.onnx_names import unused_name

# What the quantiser puts behind a value's name, for values and nodes of its own.
_MADE = re.compile(r"_(quantized|scale|zero_point|(Quantize|Dequantize)Linear)")


def name_nodes(model: ir.Model) -> None:
    """Give every node a name that no other node has, and that the quantiser will not give, in place."""
    values = {value.name for value in _values(model)}
    taken = {node.name for node in model.graph.all_nodes()}
    seen: set[str] = set()
    for number, node in enumerate(model.graph.all_nodes()):
        base = node.name or f"{node.op_type}_{number}"
        while _may_be_made(base, values):
            base = f"node.{base}"
        name, count = base, 0
        while name in seen or (name in taken and name != node.name):
            count += 1
            name = f"{base}.{count}"
        node.name = name
        seen.add(name)


def fold_betas(model: ir.Model, nodes: Collection[str]) -> None:
    """Multiply constant biases of Gemms by their ``beta``, in place, so that the graph has the same outputs with ``beta=1``.

    Args:
        model: whose nodes have names.
        nodes: names of those to look at.
    """
    graph = model.graph
    for node in graph:
        bias = node.inputs[2] if node.op_type == "Gemm" and node.name in nodes and len(node.inputs) > 2 else None
        beta = node.attributes.get_float("beta", 1.0)
        if bias is None or bias.const_value is None or not bias.is_initializer() or beta == 1:
            continue
        array = bias.const_value.numpy()
        scaled = (array * np.array(beta, array.dtype)).astype(array.dtype)
        name = unused_name(f"{bias.name}.scaled", graph)
        tensor = ir.Tensor(scaled, dtype=bias.const_value.dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(scaled.shape), const_value=tensor)
        graph.register_initializer(value)
        node.replace_input_with(2, value)
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        if bias.graph is graph and not bias.uses() and not bias.is_graph_output() and not bias.is_graph_input():
            graph.initializers.pop(bias.name or "")


def hide_names(model: ir.Model) -> dict[str, str]:
    """Rename each value whose name the quantiser might give to one of its own, in place.

    Returns:
        The former name of each of these, by the present one.
    """
    values = _values(model)
    names = {value.name for value in values}
    hidden: dict[str, str] = {}
    for value in values:
        name = value.name or ""
        if _may_be_made(name, names):
            number = len(hidden)
            while (present := f"sparsefx.hidden.{number}.") in names:  # no such name begins with another
                number += 1
            names.add(present)
            value.name = present
            hidden[present] = name
    return hidden


def restore_names(model: ir.Model, hidden: dict[str, str]) -> None:
    """Give the values that `hide_names` renamed their names back, and what was made of them names to match, in place.

    Values of the quantiser that have such a name get another.
    """
    former: dict[str, ir.Value] = {}
    for value in _values(model):
        for present, name in hidden.items():
            if (value.name or "").startswith(present):
                former[name + (value.name or "").removeprefix(present)] = value
    others = {value.name: value for value in _values(model)}
    for name, value in former.items():
        if name in others:
            others[name].name = unused_name(f"{name}.made", model.graph)
        value.name = name
    for node in model.graph.all_nodes():
        for present, name in hidden.items():
            node.name = (node.name or "").replace(present, name)


def _may_be_made(name: str, values: Collection[str | None]) -> bool:
    return any(name[: found.start()] in values for found in _MADE.finditer(name))


def _values(model: ir.Model) -> list[ir.Value]:
    """Every value that has a name, of the graph and of those within it, each once."""
    found: dict[int, ir.Value] = {}
    for graph in model.graphs():
        found.update((id(value), value) for value in (*graph.inputs, *graph.initializers.values()))
        found.update((id(value), value) for node in graph for value in node.outputs if value.name)
    return list(found.values())
