"""Takes masks out again: the zeros are in the weights, and plain ops read them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import fx

from sparsefx.ops.masked import MASKED_OPS, TRANSPOSED_CONVOLUTIONS
from sparsefx.passes.base import Pass, PassResult
from sparsefx.passes.copy_graph import copy_graph
from sparsefx.program import Program, Stage
from sparsefx.sparse_parameter import sparse_parameters
from sparsefx.verify import MASKS, is_masked_op, weight_and_mask


def _plain(name: str) -> torch._ops.OpOverload:
    packet = getattr(torch.ops.aten, name)
    overload: torch._ops.OpOverload = (
        packet.input if name in TRANSPOSED_CONVOLUTIONS and name != "conv_transpose1d" else packet.default
    )
    return overload


_PLAIN = {getattr(torch.ops.sparsefx, f"masked_{name}").default: _plain(name) for name in MASKED_OPS}


@dataclass(frozen=True)
class FinalizeMasks(Pass):
    """Masked ops become the plain ATen ops, and the masks are gone from the graph modules.

    Weights are baked: what a mask leaves out is zero in the model's own Parameter, which at rest it is already. The records of
    the model stay; `sparsefx.finalize` takes them away.
    """

    @property
    def name(self) -> str:
        return "finalize_masks"

    @property
    def before(self) -> frozenset[Stage]:
        return frozenset((Stage.MASKED, Stage.FINALIZED))

    @property
    def after(self) -> Stage:
        return Stage.FINALIZED

    def run(self, program: Program) -> PassResult:
        with torch.no_grad():
            for _, parameter, record in sparse_parameters(program.model):
                record.follow(parameter)
                parameter.detach().masked_fill_(~record.mask, 0)
        graphs = {path: _without_masks(graph_module) for path, graph_module in program.graphs.items()}
        changed = any(graphs[path] is not graph_module for path, graph_module in program.graphs.items())
        if not changed:
            return PassResult(program, changed=False)
        return PassResult(replace(program, graphs=MappingProxyType(graphs)), changed=True)


def _without_masks(original: fx.GraphModule) -> fx.GraphModule:
    if not any(is_masked_op(node) for node in original.graph.nodes):
        return original
    graph_module = copy_graph(original)
    graph = graph_module.graph
    for node in list(graph.nodes):
        if not is_masked_op(node):
            continue
        weight, mask = weight_and_mask(node)
        plain = _PLAIN.get(node.target)
        if plain is None:
            node.replace_all_uses_with(weight)
        else:
            with graph.inserting_before(node):
                replacement = graph.call_function(plain, (node.args[0], weight, *node.args[3:]), node.kwargs)
            replacement.meta = dict(node.meta)
            node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        if not mask.users:
            graph.erase_node(mask)
    graph_module._modules.pop(MASKS, None)
    graph_module.recompile()
    return graph_module
