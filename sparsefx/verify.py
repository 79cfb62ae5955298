"""What must hold of a Program at each stage. One function a rule; a stage is a list of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx, nn

from sparsefx.capture.graph_uses import attribute, parameters_read
from sparsefx.errors import VerificationError
from sparsefx.ops.masked import MASKED_OPS
from sparsefx.program import Program, Stage
from sparsefx.sparse_parameter import SparseParameter, sparse_parameters

_MASKED = {getattr(torch.ops.sparsefx, f"masked_{name}").default for name in MASKED_OPS}
_MASK_WEIGHT = torch.ops.sparsefx.mask_weight.default
Rule = Callable[[Program], Iterator[str]]


def verify(program: Program) -> None:
    """Raise VerificationError where the Program does not have what its stage requires; names the passes that made it."""
    for rule in _SPECS[program.stage]:
        for problem in rule(program):
            last, before = program.history[-1], program.history[:-1]
            after = f", which ran after {', '.join(before)}" if before else ""
            raise VerificationError(
                f"{problem}; stage {program.stage.value} requires otherwise. Made by pass {last!r}{after}. This is a bug in that "
                f"pass, or the model was changed while it ran"
            )


def is_masked_op(node: fx.Node) -> bool:
    """Whether the node is one of the ``sparsefx`` ops: weight at position 1 and mask at 2, or at 0 and 1 for mask_weight."""
    return node.op == "call_function" and (node.target in _MASKED or node.target is _MASK_WEIGHT)


def weight_and_mask(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The weight and the mask that a ``sparsefx`` op reads."""
    first = 0 if node.target is _MASK_WEIGHT else 1
    weight, mask = node.args[first], node.args[first + 1]
    assert isinstance(weight, fx.Node)
    assert isinstance(mask, fx.Node)
    return weight, mask


def _well_formed(program: Program) -> Iterator[str]:
    for path, graph_module in program.graphs.items():
        try:
            graph_module.graph.lint()
        except Exception as error:  # lint raises RuntimeError and ValueError, and others where an attribute is missing
            yield f"the graph of {path or 'the model'} is not well formed: {error}"


def _own_parameters(program: Program) -> Iterator[str]:
    own = {id(parameter) for parameter in program.model.parameters()}
    for graph_module in program.graphs.values():
        for node, parameter in parameters_read(graph_module):
            if id(parameter) not in own:
                yield f"node {node.name!r} reads {node.target!r}, which is not the model's own Parameter"


def _nothing_masked(program: Program) -> Iterator[str]:
    for graph_module in program.graphs.values():
        for node in graph_module.graph.nodes:
            if is_masked_op(node):
                yield f"node {node.name!r} is a masked op"


def _every_use_masked(program: Program) -> Iterator[str]:
    records = {id(parameter): (name, record) for name, parameter, record in sparse_parameters(program.model)}
    for graph_module in program.graphs.values():
        for node, parameter in parameters_read(graph_module):
            if id(parameter) in records:
                yield from _uses_of(graph_module, node, *records[id(parameter)])
        for node in graph_module.graph.nodes:
            if is_masked_op(node):
                weight, _ = weight_and_mask(node)
                value = attribute(graph_module, str(weight.target)) if weight.op == "get_attr" else None
                if id(value) not in records:
                    yield f"node {node.name!r} masks {weight.name!r}, which is no sparse parameter"


def _uses_of(graph_module: fx.GraphModule, node: fx.Node, name: str, record: SparseParameter) -> Iterator[str]:
    for user in node.users:
        if not is_masked_op(user) or weight_and_mask(user)[0] is not node:
            yield f"node {user.name!r} reads {name!r} without its mask"
        elif attribute(graph_module, str(weight_and_mask(user)[1].target)) is not record.mask:
            yield f"node {user.name!r} reads {name!r} with a mask that is not the model's own"


def _zeros_baked_in(program: Program) -> Iterator[str]:
    for name, parameter, record in sparse_parameters(program.model):
        if parameter.device.type != "meta" and bool((parameter.detach()[~record.mask] != 0).any()):
            yield f"{name!r} holds values where its mask is False"


def _no_masks_left(program: Program) -> Iterator[str]:
    for path, graph_module in program.graphs.items():
        if isinstance(getattr(graph_module, MASKS, None), nn.Module):
            yield f"the graph of {path or 'the model'} still holds masks"


MASKS = "sparsefx_masks"
"""Attribute of a GraphModule below which its masks stand, each under the full name of its parameter."""

_SPECS: dict[Stage, tuple[Rule, ...]] = {
    Stage.CAPTURED: (_well_formed, _own_parameters, _nothing_masked),
    Stage.MASKED: (_well_formed, _own_parameters, _every_use_masked),
    Stage.FINALIZED: (_well_formed, _own_parameters, _nothing_masked, _no_masks_left, _zeros_baked_in),
}
