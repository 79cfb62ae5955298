"""The ATen graph that channels are followed through, with the model's own tensors by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sparsefx.capture.examples import first_text, run_examples
from sparsefx.capture.export import exported_program
from sparsefx.capture.state import unchanged
from sparsefx.errors import CaptureError
from sparsefx.passes.channels.value import Weight

VIEWS = frozenset(
    (
        *(
            "alias",
            "as_strided",
            "chunk",
            "contiguous",
            "detach",
            "diagonal",
            "expand",
            "expand_as",
            "flatten",
            "getitem",
            "movedim",
        ),
        *("narrow", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t"),
        *("transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as"),
    )
)
"""Ops whose result may share the memory of their first argument."""


@dataclass(frozen=True)
class ChannelGraph:
    """One captured run.

    Attributes:
        graph: of ATen ops; it changes no tensor in place through a view.
        weights: what placeholders stand for, by node name; placeholders that are no key are inputs.
        outputs: names of the nodes that the model returns; the graph's own output may list more.
        training: the mode that it was captured in.
        changing: names of the buffers that the run writes to.
    """

    graph: fx.Graph
    weights: dict[str, Weight]
    outputs: frozenset[str]
    training: bool
    changing: frozenset[str] = frozenset()

    def read(self) -> frozenset[str]:
        """Names of the parameters and buffers that some node reads."""
        placeholders = (node for node in self.graph.nodes if node.op == "placeholder" and node.users)
        return frozenset(self.weights[node.name].name for node in placeholders if node.name in self.weights)


def capture_channels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool = False) -> ChannelGraph:
    """Capture ``model`` in eval or train mode; the model is as before.

    Raises:
        CaptureError: torch.export refuses the model, or the model these arguments.
    """
    with unchanged(model):
        model.train(training)
        try:
            program = exported_program(model, args, kwargs)
            if _writes_through_views(program.graph):
                program = program.run_decompositions({})
        except Exception as error:  # export may raise anything, from its own refusals to the model's own errors
            with torch.no_grad():
                run_examples(model, args, kwargs)
            raise CaptureError(
                f"channels of {type(model).__name__} cannot be followed: torch.export refuses it ({first_text(error)}); prune "
                "the largest of its submodules that can be exported, each with inputs of its own"
            ) from error
    outputs = frozenset(name for name in program.graph_signature.user_outputs if isinstance(name, str))
    weights = _weights(model, program)
    return ChannelGraph(program.graph, weights, outputs, training, _changing(program, weights))


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that was running when this node was made."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    # A module that is called a second time has "@1" behind its name.
    return str(path).partition("@")[0]


def op_name(node: fx.Node) -> str:
    """Name of the op, without its overload: ``add_``, ``conv2d``, ``getitem``."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target))


def _weights(model: nn.Module, program: ExportedProgram) -> dict[str, Weight]:
    signature = program.graph_signature
    own = _own_names(model)
    named: dict[str, Tensor] = {**dict(model.named_buffers(remove_duplicate=False))}
    named |= dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Weight] = {}
    for placeholder, name in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        tensor = named[name]
        found[placeholder] = Weight(own[id(tensor)], tensor.detach(), tuple(range(tensor.dim())), True)
    for placeholder, name in signature.inputs_to_lifted_tensor_constants.items():
        tensor = program.constants[name]
        if isinstance(tensor, Tensor):
            found[placeholder] = Weight(placeholder, tensor.detach(), tuple(range(tensor.dim())), False)
    return found


def _changing(program: ExportedProgram, weights: dict[str, Weight]) -> frozenset[str]:
    signature = program.graph_signature
    written = set(signature.buffers_to_mutate.values())
    found = {weights[placeholder].name for placeholder, name in signature.inputs_to_buffers.items() if name in written}
    for node in program.graph.nodes:
        if not _writes(node):
            continue
        for argument, description in zip(node.args, node.target._schema.arguments, strict=False):
            if description.alias_info is None or not description.alias_info.is_write:
                continue
            while isinstance(argument, fx.Node) and (_writes(argument) or _is_view(argument)):
                argument = argument.args[0]
            if isinstance(argument, fx.Node) and argument.name in weights:
                found.add(weights[argument.name].name)
    return frozenset(found)


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and bool(node.args) and op_name(node).removesuffix("_") in VIEWS


def _writes(node: fx.Node) -> bool:
    """Whether an op changes what a tensor holds, and not only how it is looked at."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable and node.args) and not _is_view(node)


def _own_names(model: nn.Module) -> dict[int, str]:
    """First full name of each parameter and buffer, by identity."""
    names = {id(tensor): name for name, tensor in model.named_buffers()}
    return names | {id(tensor): name for name, tensor in model.named_parameters()}


def _writes_through_views(graph: fx.Graph) -> bool:
    """Whether an in-place op changes a tensor that others see too: then the graph says less than what it computes."""
    position = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        for argument, description in zip(node.args, target._schema.arguments, strict=False):
            written = description.alias_info is not None and description.alias_info.is_write
            if not written or not isinstance(argument, fx.Node):
                continue
            if _seen_elsewhere(argument, node, position):
                return True
    return False


def _seen_elsewhere(written: fx.Node, writer: fx.Node, position: dict[fx.Node, int]) -> bool:
    """Whether anything but the writer's result shows the memory that it writes to after it."""
    reader = writer
    while True:
        # Views that were taken before the write see it, wherever they are read; so does a later reader.
        if any(op_name(user) in VIEWS or position[user] > position[writer] for user in written.users if user is not reader):
            return True
        if not _is_view(written):
            return False
        reader, above = written, written.args[0]
        if not isinstance(above, fx.Node):
            return True
        written = above
