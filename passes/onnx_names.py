"""Give the weights of an exported ONNX graph their parameters' names, and strip what differs from run to run."""

from __future__ import annotations

import ast
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common

from sparsefx.passes.onnx_weights import Array, weight_uses

_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"


@dataclass(frozen=True)
class Source:
    """What an initializer was made from.

    Attributes:
        parameters: names of the parameters, one unless several were joined.
        permutation: parameter axis of each axis of the initializer; None where it is more than a permutation.
    """

    parameters: tuple[str, ...]
    permutation: tuple[int, ...] | None

    @property
    def text(self) -> str:
        """The names joined by ``+``."""
        return "+".join(self.parameters)


def fold_transposes(model: ir.Model) -> dict[str, Source]:
    """Replace each Transpose of an initializer by a transposed initializer, in place, before any other optimisation.

    The exporter writes a Linear on 3-D input as ``MatMul(x, Transpose(weight))``. Folding it here rather than in a
    general constant folder keeps the name: the parameter's own where every use of it is transposed alike, and
    ``<name>.transposed`` where the parameter is also read as it is.

    Returns:
        Every initializer of the graph that stands for one parameter or buffer, by name.
    """
    graph = model.graph
    sources = {name: Source((name,), tuple(range(len(value.shape or ())))) for name, value in list(graph.initializers.items())}
    for name, value in list(graph.initializers.items()):
        if value.const_value is None or value.is_graph_output():
            continue
        by_permutation: dict[tuple[int, ...], list[ir.Node]] = {}
        others = 0
        for node, _ in value.uses():
            if node.op_type == "Transpose" and node.domain in ("", "ai.onnx") and not node.outputs[0].is_graph_output():
                rank = len(value.shape or ())
                permutation = tuple(node.attributes.get_ints("perm", list(range(rank))[::-1]))
                by_permutation.setdefault(permutation, []).append(node)
            else:
                others += 1
        alone = others == 0 and len(by_permutation) == 1
        for permutation, nodes in by_permutation.items():
            new_name = name if alone else unused_name(f"{name}.transposed", graph)
            array = np.ascontiguousarray(np.transpose(value.const_value.numpy(), permutation))
            replacement = _initializer(new_name, array, value.const_value.dtype)
            for node in nodes:
                node.outputs[0].replace_all_uses_with(replacement)
                assert node.graph is not None  # the graph itself, or a branch in it
                node.graph.remove(node, safe=True)
            if alone:
                graph.initializers.pop(name)
            graph.register_initializer(replacement)
            sources[new_name] = Source((name,), permutation)
    return sources


def name_folded(model: ir.Model, sources: dict[str, Source]) -> dict[str, Source]:
    """After optimisation: rename initializers that were folded from parameters, in place, and complete the name map.

    A part of one parameter (a third of an attention's ``in_proj_weight``, an LSTM weight with its gates reordered) gets the
    parameter's name where that is free, else ``<name>.1``, ``<name>.2`` in graph order.
    """
    graph = model.graph
    found: dict[str, Source] = {}
    for name, value in list(graph.initializers.items()):
        if name in sources:
            found[name] = sources[name]
            continue
        folded = value.metadata_props.get(_FOLDED_FROM, "")
        try:
            names = ast.literal_eval(folded) if folded else []
        except (ValueError, SyntaxError):
            names = []
        parents = [sources[parent] for parent in names if parent in sources]
        rank = len(value.shape or ())
        parameters = tuple(dict.fromkeys(parameter for parent in parents for parameter in parent.parameters))
        if not parameters or rank == 0:
            continue
        base = "+".join(parameters)
        new_name = base if base not in graph.initializers and not _is_taken(base, graph) else _numbered(base, graph)
        graph.initializers.pop(name)
        value.name = new_name
        if value.const_value is not None:
            value.const_value.name = new_name
        graph.initializers[new_name] = value
        found[new_name] = Source(parameters, None)
    return found


def make_plain(model: ir.Model, sources: dict[str, Source]) -> None:
    """Make every weight that stands behind a Split, Slice, Reshape, Transpose or Cast an initializer of its own, in place.

    Sparse kernels take plain initializers only, and the optimizer leaves large tensors unfolded. The new initializers are
    called ``<name>.1``, ``<name>.2`` in graph order, and are added to ``sources``.
    """
    graph = model.graph
    made: dict[int, ir.Value] = {}
    for use in list(weight_uses(model)):
        producer = use.value.producer()
        if use.direct or use.array is None or use.problem or producer is None or producer.graph is not graph:
            continue
        if any(node.op_type in _QUANTISERS for node in _producers(use.value)):
            continue
        if id(use.value) in made:
            continue
        parameters = tuple(dict.fromkeys(p for name in use.initializers if name in sources for p in sources[name].parameters))
        name = _numbered("+".join(parameters or use.initializers), graph)
        replacement = _initializer(name, np.ascontiguousarray(use.array), use.value.dtype)
        use.value.replace_all_uses_with(replacement)
        graph.register_initializer(replacement)
        made[id(use.value)] = replacement
        if parameters:
            sources[name] = Source(parameters, None)
    if made:
        ir.passes.common.RemoveUnusedNodesPass()(model)


def without_negative_zeros(model: ir.Model) -> None:
    """Write the zeros of every weight as plain zeros, in place.

    ``weight * mask`` leaves negative zeros behind. They mean the same, and would stand in the way of encodings that tell
    zeros by their bits.
    """
    for use in weight_uses(model):
        array = use.array
        if not use.direct or array is None or array.dtype.kind in "iub":
            continue
        zeros = array == 0
        if np.signbit(array[zeros]).any():
            name = use.value.name or ""
            use.value.const_value = ir.Tensor(np.where(zeros, np.zeros((), array.dtype), array), dtype=use.value.dtype, name=name)


def adopt_constants(model: ir.Model) -> None:
    """Register every constant that a node reads and the graph does not hold, under a name of its own, in place.

    The optimizer names the bounds of a fused Clip after what is clipped. Where one value is clipped twice, the second
    pair of bounds takes the place of the first among the initializers, and the first Clip reads what is not there.
    """
    graph = model.graph
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is None or value.producer() is not None or value.is_graph_input() or value.const_value is None:
                continue
            if graph.initializers.get(value.name or "") is not value and node.graph is graph:
                value.name = _numbered(value.name or "constant", graph)
                value.const_value.name = value.name
                graph.register_initializer(value)


def name_inputs(model: ir.Model, names: list[str]) -> None:
    """Name the graph's inputs, in place.

    Where the graph gives an input back, the optimizer puts a copy in between and lets that have the name.
    """
    graph = model.graph
    for value, name in zip(graph.inputs, names, strict=True):
        if value.name == name:
            continue
        for node in graph.all_nodes():
            for output in node.outputs:
                if output.name == name:
                    output.name = _numbered(name, graph)
        value.name = name


def name_outputs(model: ir.Model, names: list[str]) -> None:
    """Name the graph's outputs, in place; a name that another value has stays as the exporter made it."""
    for value, name in zip(model.graph.outputs, names, strict=False):
        taken = name in model.graph.initializers or _is_taken(name, model.graph)
        if not value.is_graph_input() and not value.is_initializer() and not taken:
            value.name = name


def name_sizes(model: ir.Model, names: dict[str, str]) -> None:
    """Give dynamic sizes their names in every shape of the graph, in place."""
    graph = model.graph
    values = [*graph.inputs, *graph.outputs, *(output for node in graph.all_nodes() for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            sizes = [
                names.get(size.value or "", size.value) if isinstance(size, ir.SymbolicDim) else size for size in value.shape
            ]
            value.shape = ir.Shape(sizes)


def strip_metadata(model: ir.Model) -> None:
    """Remove stack traces, file paths and exporter notes, in place: they say where a file was made, not what it computes."""
    model.doc_string = None
    model.producer_version = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [output for node in model.graph.all_nodes() for output in node.outputs]
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value.doc_string = None


def _initializer(name: str, array: Array, dtype: ir.DataType | None) -> ir.Value:
    tensor = ir.Tensor(array, dtype=dtype, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)


def _producers(value: ir.Value) -> list[ir.Node]:
    """The nodes behind a constant value, nearest first, along the first operands."""
    found = []
    producer = value.producer()
    while producer is not None:
        found.append(producer)
        first = producer.inputs[0] if producer.inputs else None
        producer = first.producer() if first is not None else None
    return found


def _is_taken(name: str, graph: ir.Graph) -> bool:
    return any(name == value.name for value in graph.inputs) or any(
        name == output.name for node in graph.all_nodes() for output in node.outputs
    )


def unused_name(name: str, graph: ir.Graph) -> str:
    """The name itself where no value of the graph has it, else numbered."""
    return name if name not in graph.initializers and not _is_taken(name, graph) else _numbered(name, graph)


def _numbered(name: str, graph: ir.Graph) -> str:
    number = 1
    while f"{name}.{number}" in graph.initializers or _is_taken(f"{name}.{number}", graph):
        number += 1
    return f"{name}.{number}"
