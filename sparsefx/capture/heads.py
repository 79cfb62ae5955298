"""Finds the output layers of models that read integers: the heads of language models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from sparsefx.capture.graph_uses import parameters_read
from sparsefx.capture.uses import EMBEDDINGS, SAME_ELEMENTS, VIEWS, is_known_product, op_name

# What may stand between a head and the model's output: shapes, casts, normalisation to probabilities.
_TRANSPARENT = SAME_ELEMENTS | VIEWS | {"softmax", "log_softmax", "sigmoid", "dropout", "cat", "stack", "output", "index"}


def language_model_heads(graph_module: fx.GraphModule, names: Mapping[int, str]) -> frozenset[str]:
    """Parameters of the layers whose products reach the output through shape ops, casts and softmax only, and no layer.

    Meant for graphs in which integers reach an embedding, see `reads_tokens`.
    """
    nodes = list(graph_module.graph.nodes)
    parameter_of = {
        node: names[id(value)] for node, value in parameters_read(graph_module) if id(value) in names and value.ndim > 1
    }
    # Backwards, each node once: does its value reach the output untouched, and does it reach another layer?
    reaches_output: set[fx.Node] = set()
    reaches_layer: set[fx.Node] = set()
    heads: set[str] = set()
    for node in reversed(nodes):
        name = "output" if node.op == "output" else op_name(node.target)
        if any(user in reaches_output and _is_transparent(user) for user in node.users) or node.op == "output":
            reaches_output.add(node)
        reads_weight = is_known_product(name) and any(source in parameter_of for source in _sources(node))
        if any(user in reaches_layer for user in node.users):
            reaches_layer.add(node)
        elif reads_weight and node in reaches_output:
            heads.update(parameter_of[source] for source in _sources(node) if source in parameter_of)
        if reads_weight:
            reaches_layer.add(node)
    return frozenset(heads)


def _is_transparent(node: fx.Node) -> bool:
    return node.op == "output" or op_name(node.target) in _TRANSPARENT


def _sources(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node, seen through transposes and casts of a weight."""
    found: list[fx.Node] = []
    for source in node.all_input_nodes:
        while source.op in ("call_function", "call_method") and op_name(source.target) in SAME_ELEMENTS | VIEWS:
            if not source.all_input_nodes:
                break
            source = source.all_input_nodes[0]
        found.append(source)
    return found


def reads_tokens(graph_module: fx.GraphModule) -> bool:
    """Whether an integer input of the graph reaches an embedding as its indices."""
    reached: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            if isinstance(value, Tensor) and not value.dtype.is_floating_point and value.dtype != torch.bool:
                reached.add(node)
        elif any(source in reached for source in node.all_input_nodes):
            if node.op == "call_function" and op_name(node.target) in EMBEDDINGS:
                return True
            # Only integers are followed: what was computed from them through floats is no index any more.
            value = node.meta.get("val")
            if isinstance(value, Tensor) and not value.dtype.is_floating_point:
                reached.add(node)
    return False
