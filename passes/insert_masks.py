"""Rewrites every use of a sparse parameter into a masked op, so that the graph itself says what is sparse."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from sparsefx.capture import capture
from sparsefx.capture.graph_uses import parameters_read
from sparsefx.capture.uses import op_name
from sparsefx.errors import CaptureError
from sparsefx.ops.masked import MASKED_OPS
from sparsefx.passes.base import Pass, PassResult, Pipeline
from sparsefx.passes.copy_graph import copy_graph
from sparsefx.program import Program, Stage
from sparsefx.sparse_parameter import SparseParameter, sparse_parameters
from sparsefx.verify import MASKS, is_masked_op


@dataclass(frozen=True)
class InsertMasks(Pass):
    """Linear and convolution nodes that read a sparse parameter become ``sparsefx.masked_*``; for all other uses of it
    (a transposed product, attention, a recurrent layer), ``sparsefx.mask_weight`` stands right behind the parameter.

    The masks are attributes of the graph module, the very tensors of the model's records: a mask that moves, moves here too.
    """

    @property
    def name(self) -> str:
        return "insert_masks"

    @property
    def before(self) -> frozenset[Stage]:
        return frozenset((Stage.CAPTURED, Stage.MASKED))

    @property
    def after(self) -> Stage:
        return Stage.MASKED

    def run(self, program: Program) -> PassResult:
        records: dict[int, tuple[str, SparseParameter]] = {}
        for name, parameter, record in sparse_parameters(program.model):
            record.follow(parameter)
            records[id(parameter)] = (name, record)
        graphs: dict[str, fx.GraphModule] = {}
        changed = False
        for path, graph_module in program.graphs.items():
            found = any(
                id(parameter) in records and any(not is_masked_op(user) for user in node.users)
                for node, parameter in parameters_read(graph_module)
            )
            graphs[path] = _masked(graph_module, records) if found else graph_module
            changed = changed or found
        if not changed:
            return PassResult(program, changed=False)
        return PassResult(replace(program, graphs=MappingProxyType(graphs)), changed=True)


def masked_graph(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """Capture a sparsified model and insert its masks: one graph of the whole model, over its own Parameters and masks.

    Args:
        model: sparsified, in the mode (train or eval) that is meant.
        example_inputs: see `sparsefx.capture.capture`.

    Raises:
        CaptureError: the model does not run on the inputs, or cannot be captured as one graph.
    """
    program = capture(model, example_inputs)
    _ = program.whole  # refuses early, with the reasons
    if example_inputs is None:
        _expect_one_way_to_call(model)
    return Pipeline((InsertMasks(),)).run(program).program.whole


def _expect_one_way_to_call(model: nn.Module) -> None:
    """A trace without inputs takes every argument as given, so an argument that may be left out would be taken wrongly."""
    optional = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    ]
    if optional:
        raise CaptureError(
            f"the forward of {type(model).__name__} has arguments that may be left out ({', '.join(optional)}), and a graph "
            "holds one way to call it; pass example_inputs"
        )


def _masked(original: fx.GraphModule, records: dict[int, tuple[str, SparseParameter]]) -> fx.GraphModule:
    graph_module = copy_graph(original)
    graph = graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node, parameter in reversed(list(parameters_read(graph_module))):
        if id(parameter) not in records:
            continue
        name, record = records[id(parameter)]
        users = [user for user in node.users if not is_masked_op(user)]
        if not users:
            continue
        _put_mask(graph_module, name, record.mask)
        # Computation starts behind the last placeholder, wherever the parameter itself is read.
        point = placeholders[-1] if placeholders and order[placeholders[-1]] > order[node] else node
        with graph.inserting_after(point):
            mask = graph.get_attr(f"{MASKS}.{name}")
        mask.meta["val"] = record.mask
        others = [user for user in users if not _rewrite(graph, user, node, mask)]
        if others:
            with graph.inserting_after(mask):
                masked = graph.call_function(torch.ops.sparsefx.mask_weight.default, (node, mask))
            masked.meta = dict(node.meta)
            for user in others:
                user.replace_input_with(node, masked)
    graph_module.recompile()
    return graph_module


def _rewrite(graph: fx.Graph, user: fx.Node, weight: fx.Node, mask: fx.Node) -> bool:
    """Turn a node that reads the weight as its weight, and nowhere else, into the masked op of its kind."""
    name = op_name(user.target)
    if user.op != "call_function" or name not in MASKED_OPS:
        return False
    args, kwargs = list(user.args), dict(user.kwargs)
    if "input" in kwargs:
        args.insert(0, kwargs.pop("input"))
    if len(args) == 1 and kwargs.get("weight") is weight:
        args.append(kwargs.pop("weight"))
    if len(args) < 2 or args[1] is not weight:
        return False
    rest = [*args[:1], *args[2:], *kwargs.values()]
    sizes = [*args[3:], *(value for key, value in kwargs.items() if key != "bias")]
    if any(argument is weight for argument in rest) or any(isinstance(size, (str, fx.Node)) for size in sizes):
        return False  # padding="same", or sizes that the graph computes: the general form serves them
    target = getattr(torch.ops.sparsefx, f"masked_{name}").default
    args, kwargs = _spelled_out(target, [args[0], weight, mask, *args[2:]], kwargs)
    with graph.inserting_before(user):
        masked = graph.call_function(target, tuple(args), kwargs)
    masked.meta = dict(user.meta)
    user.replace_all_uses_with(masked)
    graph.erase_node(user)
    return True


def _spelled_out(target: torch._ops.OpOverload, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """One number for all dimensions (``stride=2``) as the list that a registered op takes."""
    arguments = target._schema.arguments
    lengths = {argument.name: getattr(argument, "N", None) for argument in arguments}  # the n of a schema's SymInt[n]

    def spelled_out(name: str, value: Any) -> Any:
        length = lengths.get(name)
        return [value] * length if length is not None and isinstance(value, int) else value

    spelled = [spelled_out(argument.name, value) for argument, value in zip(arguments, args, strict=False)]
    return spelled, {name: spelled_out(name, value) for name, value in kwargs.items()}


def _put_mask(graph_module: fx.GraphModule, name: str, mask: torch.Tensor) -> None:
    """Register the mask as a buffer below ``MASKS``; not persistent, so that state_dict keys stay the model's."""
    owner: nn.Module = graph_module
    *path, local_name = [MASKS, *name.split(".")]
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner.register_buffer(local_name, mask, persistent=False)
