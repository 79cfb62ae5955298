"""Pad the input channels of 2:4 weights with zeros, in the graph, where that makes them fit sparse kernels and saves work.

A weight whose inputs do not come in steps of 16 (24 channels of a small network, 40 that channel pruning left) is dense for most
tools, and one whose inputs do not come in fours (the 3 of an image) cannot be 2:4 at all. With zeros behind its last input, and
as many zeros behind the data that meets them, every sum has the same terms and some zeros more.

It pays where the padded sparse product has fewer terms than the dense one had: 2:4 halves them, so the padded size has to be
below twice the size. Sixteen is tried first, then four, which is all that the hardware asks for. A weight that is 2:4 as it is
stays where its outputs do not come in steps of 8, since no number of inputs would make that good.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsefx.passes.onnx_names import unused_name
from sparsefx.passes.onnx_weights import WeightUse, holds, output_axis, weight_uses, with_zeros
from sparsefx.passes.tensor_cores import OUTPUT_MULTIPLE

PADDED_KEY = "sparsefx.padded"
"""Metadata of a padded weight: how many inputs it had."""
_MULTIPLES = (16, 4)
_OPS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class PaddedWeight:
    """A weight that has more inputs now.

    Attributes:
        name: of the initializer.
        before: inputs that it had.
        after: inputs that it has.
    """

    name: str
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.name}: {self.before} inputs padded with zeros to {self.after}, by a Pad in front of the op that reads it"


def padded_size(use: WeightUse) -> int | None:
    """How many inputs a weight should be padded to; None where padding is not possible, does not help or does not pay."""
    array, axis = use.array, use.axis
    if use.op not in _OPS or use.operand != 1 or use.groups != 1 or array is None or axis is None or use.problem:
        return None
    if array.ndim < 2 or array.dtype.kind in "iub":
        return None
    length = int(array.shape[axis])
    if length % 4 == 0 and array.shape[output_axis(use.op, axis, array.ndim)] % OUTPUT_MULTIPLE:
        return None
    for multiple in _MULTIPLES:
        size = -(-length // multiple) * multiple
        if length < size < 2 * length and holds(with_zeros(array, axis, size), axis, 2, 4):
            return size
    return None


def pad_inputs(model: ir.Model) -> tuple[PaddedWeight, ...]:
    """Pad every weight for which `padded_size` gives a size and that no other op reads, in place, under its own name."""
    graph = model.graph
    found: dict[str, list[WeightUse]] = {}
    for use in weight_uses(model):
        if use.direct:
            found.setdefault(use.initializers[0], []).append(use)
    missing: dict[ir.Node, tuple[int, str]] = {}
    done: list[PaddedWeight] = []
    for name, uses in found.items():
        value = graph.initializers.get(name)
        sizes = {(padded_size(use), use.axis) for use in uses}
        if value is None or value.is_graph_output() or value.is_graph_input() or len(sizes) != 1:
            continue
        ((size, axis),) = sizes
        readers = value.uses()
        if size is None or axis is None or len(readers) != len(uses) or any(node.graph is not graph for node, _ in readers):
            continue
        old = value.const_value
        assert old is not None
        array = old.numpy()
        length = array.shape[axis]
        padded = with_zeros(array, axis, size)
        metadata = {**old.metadata_props, PADDED_KEY: str(length)}
        value.const_value = ir.Tensor(padded, dtype=old.dtype, name=name, metadata_props=metadata)
        value.shape = ir.Shape(padded.shape)
        missing.update((node, (size - length, name)) for node, _ in readers)
        done.append(PaddedWeight(name, length, size))
    # In the order of the graph, since nodes that read different weights may share a Pad.
    pads: dict[tuple[int, int, int], ir.Value] = {}
    for node in [node for node in graph if node in missing]:
        amount, name = missing[node]
        data = node.inputs[0]
        assert data is not None
        key = (id(data), _data_axis(node), amount)
        if key not in pads:
            pads[key] = _pad(graph, node, data, key[1], amount, f"{name}.padded_input")
        node.replace_input_with(0, pads[key])
    return tuple(done)


def _data_axis(node: ir.Node) -> int:
    """The axis of the data over which the op sums."""
    if node.op_type == "Conv":
        return 1
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transA", 0) else 1
    return -1


def _pad(graph: ir.Graph, reader: ir.Node, data: ir.Value, axis: int, amount: int, name: str) -> ir.Value:
    """Zeros behind the last entry of ``data`` along ``axis``, by a node in front of the first one that reads them."""
    shape = None
    if data.shape is not None:
        sizes = [size if isinstance(size, int) else size.value for size in data.shape]
        size = sizes[axis]
        sizes[axis] = size + amount if isinstance(size, int) else None
        shape = ir.Shape(sizes)
    output = ir.Value(name=unused_name(name, graph), type=data.type, shape=shape)
    amounts = _constant(graph, f"sparsefx.pad.{amount}", [0, amount])
    axes = _constant(graph, f"sparsefx.pad.axis.{axis}", [axis])
    graph.insert_before(
        reader, ir.node("Pad", [data, amounts, None, axes], {"mode": "constant"}, outputs=[output], name=output.name)
    )
    return output


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.Tensor(np.array(numbers, np.int64), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(numbers)]), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]
