"""Finds every use of every parameter in an fx graph, following views, casts and scalings to the op that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsefx.capture.uses import (
    METADATA,
    ONE_HOT,
    SAME_ELEMENTS,
    SCALINGS,
    VIEWS,
    Use,
    View,
    as_lookup,
    is_known_product,
    op_name,
    read_uses,
)
from sparsefx.program import CallSite, Rung

# Higher-order ops whose body runs once, with the operands behind it, in order.
_WRAPPERS = frozenset(("wrap_with_autocast", "wrap_with_set_grad_enabled"))


def graph_call_sites(graph_module: fx.GraphModule, names: Mapping[int, str], rung: Rung, prefix: str = "") -> list[CallSite]:
    """Every use of a parameter, in order.

    Args:
        graph_module: the captured graph; the shapes in ``node.meta["val"]`` are used where they are.
        names: full parameter name by ``id(parameter)``.
        rung: noted on each site.
        prefix: module path of the graph, put before the paths of its callers.
    """
    walker = _Walker(names, rung, prefix)
    walker.walk(graph_module, {})
    return walker.sites


def attribute(graph_module: nn.Module, target: str) -> Any:
    """What a ``get_attr`` node reads; None where it is not there."""
    value: Any = graph_module
    for part in target.split("."):
        value = getattr(value, part, None)
    return value


def caller(node: fx.Node) -> str:
    """Path of the innermost module whose forward made the node; empty for the root, or where unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return str(path).removeprefix("L['self'].").split("@")[0]


def value_shape(node: Any) -> tuple[int, ...] | None:
    """The shape of what a node gives (of its first result), where capture noted it."""
    if isinstance(node, Tensor):
        return tuple(node.shape)
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(value.shape)


class _Walker:
    def __init__(self, names: Mapping[int, str], rung: Rung, prefix: str) -> None:
        self.names = names
        self.rung = rung
        self.prefix = prefix
        self.sites: list[CallSite] = []
        self.one_hot: set[fx.Node] = set()

    def walk(self, graph_module: fx.GraphModule, views: dict[fx.Node, Any]) -> None:
        """``views`` maps a node to the View it stands for, or to a tuple of Views for ops with several results."""
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                value = attribute(graph_module, node.target)
                if isinstance(value, nn.Parameter) and id(value) in self.names:
                    views[node] = View.of(self.names[id(value)], value)
            elif self.is_one_hot(node):
                self.one_hot.add(node)
            elif any(argument in views for argument in node.all_input_nodes):
                self.visit(graph_module, node, views)

    def visit(self, graph_module: fx.GraphModule, node: fx.Node, views: dict[fx.Node, Any]) -> None:
        name = "output" if node.op == "output" else op_name(node.target)
        if name == "getattr":
            name = str(node.args[1])
            name = {"data": "detach", "T": "numpy_T"}.get(name, name)
        if name in METADATA:
            return
        if name in _WRAPPERS and self.enter(graph_module, node, views):
            return
        result = self.passed_on(name, node, views)
        if result is not None:
            views[node] = result
            return

        def view_of(argument: Any) -> View | None:
            found = views.get(argument) if isinstance(argument, fx.Node) else None
            return found if isinstance(found, View) else None

        uses = read_uses(name, node.args, node.kwargs, view_of, value_shape, value_shape(node))
        if is_known_product(name) and any(argument in self.one_hot for argument in node.all_input_nodes):
            uses = [as_lookup(use) for use in uses]
        where = caller(node)
        where = f"{self.prefix}.{where}" if self.prefix and where else self.prefix or where
        self.sites.extend(as_site(use, where, self.rung) for use in uses)

    def is_one_hot(self, node: fx.Node) -> bool:
        """Whether the node gives a one-hot tensor, or a view or cast of one."""
        if node.op not in ("call_function", "call_method"):
            return False
        name = op_name(node.target)
        passes_on = name in VIEWS or name in SAME_ELEMENTS
        return name == ONE_HOT or (passes_on and bool(node.args) and node.args[0] in self.one_hot)

    def enter(self, graph_module: fx.GraphModule, node: fx.Node, views: dict[fx.Node, Any]) -> bool:
        """Follow the operands of a wrapper into its body."""
        for position, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and argument.op == "get_attr":
                body = attribute(graph_module, str(argument.target))
                if isinstance(body, fx.GraphModule):
                    placeholders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
                    pairs = zip(placeholders, node.args[position + 1 :], strict=True)
                    inside = {p: views[operand] for p, operand in pairs if isinstance(operand, fx.Node) and operand in views}
                    self.walk(body, inside)
                    return True
        return False

    def passed_on(self, name: str, node: fx.Node, views: dict[fx.Node, Any]) -> Any:
        """What the node stands for where it only passes a parameter on, else None."""
        source = node.args[0] if node.args else None
        view = views.get(source) if isinstance(source, fx.Node) else None
        if name in SCALINGS:
            factor_views = [views[a] for a in node.all_input_nodes if a in views]
            if len(factor_views) == 1 and isinstance(factor_views[0], View):
                scaled = factor_views[0]
                divides = name in ("div", "truediv", "__truediv__", "true_divide", "divide") and view is None
                plain_number = all(not isinstance(a, fx.Node) for a in node.args if a not in views)
                if not divides and (plain_number or value_shape(node) == scaled.view_shape):
                    return scaled
            return None
        if view is None or sum(argument in views for argument in node.all_input_nodes) != 1:
            return None
        if name in SAME_ELEMENTS:
            return view
        if name not in VIEWS:
            return None
        if isinstance(view, tuple):
            index = node.args[1]
            return view[index] if isinstance(index, int) else None
        if len(node.all_input_nodes) > 1:
            return None
        probe = torch.empty_strided(view.view_shape, view.view_strides, device="meta")
        try:
            if node.op == "call_method":
                result = getattr(probe, name)(*node.args[1:], **node.kwargs)
            else:
                result = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        except Exception:  # what the op makes of it decides; an op that refuses the probe is an unknown one
            return None
        parts = list(result) if isinstance(result, (list, tuple)) else [result]
        # What an op copied to give it this shape has other strides than the parameter's memory.
        if any(part is not probe and part._base is not probe for part in parts):
            return None
        return tuple(view.like(part) for part in parts) if isinstance(result, (list, tuple)) else view.like(result)


def as_site(use: Use, where: str, rung: Rung) -> CallSite:
    """A Use with the place it was found at."""
    return CallSite(
        parameter=use.view.parameter,
        op=use.op,
        where=where,
        rung=rung,
        reduction_axis=use.reduction_axis,
        groups=use.groups,
        flops=use.flops,
        problem=use.problem,
    )


def parameters_read(graph_module: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Parameter]]:
    """The ``get_attr`` nodes that read a Parameter, with it."""
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value = attribute(graph_module, node.target)
            if isinstance(value, nn.Parameter):
                yield node, value
