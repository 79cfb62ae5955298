"""Finds the output layers of models that read integers: the heads of language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from sparsefx.capture.graph_uses import parameters_read
from sparsefx.capture.uses import EMBEDDINGS, SAME_ELEMENTS, VIEWS, is_known_product, op_name

# What may stand between a head and the model's output: shapes, casts, normalisation to probabilities, choices among
# scores, means over positions, and the loss itself.
_TRANSPARENT = (
    SAME_ELEMENTS
    | VIEWS
    | {"softmax", "log_softmax", "sigmoid", "logsigmoid", "dropout", "cat", "stack", "output", "index", "getitem", "neg", "clamp"}
    | {"masked_fill", "where", "mean", "sum", "amax", "max", "argmax", "topk", "gather"}
    | {"cross_entropy_loss", "nll_loss", "nll_loss_nd", "mse_loss", "binary_cross_entropy_with_logits"}
)
# Scaling and shifting scores by what is no activation (a temperature, a bias, a mask); between two activations they are a
# residual sum or a gate, and what feeds them is no head.
_SCALING = frozenset(("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_", "rsub", "truediv", "iadd", "imul"))
_HEAD_PRODUCTS = frozenset(("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "__matmul__"))


def language_model_heads(graph_module: fx.GraphModule, names: Mapping[int, str]) -> frozenset[str]:
    """Parameters of linear layers whose products are the output, but for what `_TRANSPARENT` lists, and feed no other product.

    Only what is computed from embedded integers counts: the image side of a model of both has heads of another kind. Features
    that are compared with others in a product of two activations, as texts with images, are no scores of classes.
    """
    parameter_of = _weights_read(graph_module, names)
    activations = _from_tokens(graph_module)
    reaches_output: set[fx.Node] = set()
    heads: set[str] = set()
    for node, feeds_product in _backwards(graph_module, _is_product):
        transparent = (user for user in node.users if user in reaches_output and _passes_scores(user, activations))
        if node.op == "output" or any(transparent):
            reaches_output.add(node)
        read = _products_of(node, parameter_of)
        plain = node.op == "call_function" and op_name(node.target) in _HEAD_PRODUCTS
        if read and plain and not feeds_product and node in reaches_output and node in activations:
            heads.update(read)
    return frozenset(heads)


def final_layers(graph_module: fx.GraphModule, names: Mapping[int, str]) -> frozenset[str]:
    """Parameters behind whose products no further layer stands, whatever else does."""
    parameter_of = _weights_read(graph_module, names)
    found: set[str] = set()
    for node, feeds_layer in _backwards(graph_module, lambda node: bool(_products_of(node, parameter_of))):
        if not feeds_layer:
            found.update(_products_of(node, parameter_of))
    return frozenset(found)


def reads_tokens(graph_module: fx.GraphModule) -> bool:
    """Whether an integer input of the graph reaches an embedding as its indices."""
    return bool(_from_tokens(graph_module))


def vocabularies(graph_module: fx.GraphModule, names: Mapping[int, str]) -> frozenset[str]:
    """Parameters of the embeddings that an integer input of the graph indexes; tables of positions are none of them."""
    integers, _ = _integers_and_activations(graph_module)
    parameter_of = _weights_read(graph_module, names)
    found: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and op_name(node.target) in EMBEDDINGS and any(s in integers for s in node.all_input_nodes):
            found.update(parameter_of[source] for source in _sources(node) if source in parameter_of)
    return frozenset(found)


def _backwards(graph_module: fx.GraphModule, counts: Callable[[fx.Node], bool]) -> list[tuple[fx.Node, bool]]:
    """Every node, the output first, and whether a node that ``counts`` reads what comes of it."""
    reaches: set[fx.Node] = set()
    found: list[tuple[fx.Node, bool]] = []
    for node in reversed(list(graph_module.graph.nodes)):
        feeds = any(user in reaches for user in node.users)
        found.append((node, feeds))
        if feeds or counts(node):
            reaches.add(node)
    return found


def _is_product(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and is_known_product(op_name(node.target))


def _weights_read(graph_module: fx.GraphModule, names: Mapping[int, str]) -> dict[fx.Node, str]:
    return {node: names[id(value)] for node, value in parameters_read(graph_module) if id(value) in names and value.ndim > 1}


def _products_of(node: fx.Node, parameter_of: Mapping[fx.Node, str]) -> list[str]:
    """The weights that a layer reads; none where the node is no layer."""
    if not _is_product(node):
        return []
    return [parameter_of[source] for source in _sources(node) if source in parameter_of]


def _passes_scores(node: fx.Node, activations: set[fx.Node]) -> bool:
    name = "output" if node.op == "output" else op_name(node.target)
    if name in _SCALING:
        return sum(source in activations for source in node.all_input_nodes) == 1
    return name in _TRANSPARENT


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


def _from_tokens(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Embeddings whose indices are an integer input of the graph, and all that is computed from them."""
    return _integers_and_activations(graph_module)[1]


def _integers_and_activations(graph_module: fx.GraphModule) -> tuple[set[fx.Node], set[fx.Node]]:
    """What is computed from integer inputs in integers, and what from embeddings that these index."""
    integers: set[fx.Node] = set()
    activations: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        integral = isinstance(value, Tensor) and not value.dtype.is_floating_point
        if node.op == "placeholder":
            if integral and isinstance(value, Tensor) and value.dtype != torch.bool:
                integers.add(node)
        elif any(source in activations for source in node.all_input_nodes):
            activations.add(node)
        elif any(source in integers for source in node.all_input_nodes):
            if node.op == "call_function" and op_name(node.target) in EMBEDDINGS:
                activations.add(node)
            # Only integers are followed: what was computed from them through floats is no index any more.
            elif integral:
                integers.add(node)
    return integers, activations
