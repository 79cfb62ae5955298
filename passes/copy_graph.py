"""Copies of graphs, so that a pass leaves what it was given as it was."""

from __future__ import annotations

import copy

from torch import fx


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule of its own over the same Parameters, buffers and leaf modules, with a copy of the graph."""
    graph = copy.deepcopy(graph_module.graph)
    # It takes `training` from its root; `train()` is not called, since leaf modules are the user's own.
    return fx.GraphModule(graph_module, graph, class_name=type(graph_module).__name__)
