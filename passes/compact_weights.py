"""Store 2:4 weights of an ONNX graph as two values and a 4-bit code for each group of four, and back.

The encoding is made of standard ops only, which every runtime folds when it loads the file: 2-bit places, four in a byte,
are unpacked by BitShift and BitwiseAnd, and the values put in their places by ScatterElements. At 2:4 a float16 weight takes
9/16 of its bytes and a float32 weight 17/32. TensorRT takes plain initializers only: `densify` makes them again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparsefx.passes.onnx_weights import Array, WeightUse, holds, weight_uses

OLDEST_OPSET = 18  # BitwiseAnd
_SHIFTS, _MASK = "sparsefx.compact.shifts", "sparsefx.compact.mask"
# What the seven nodes of a decoder take in a file, beside the names in them; a weight that saves less stays plain.
_DECODER_BYTES, _NAMES_IN_DECODER = 800, 20
# What Expand and ScatterElements take in every version; 8-bit floats are not among it.
_FLOATS = ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")
_INTEGERS = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
ENCODED_TYPES = frozenset(ir.DataType[name] for name in (*_FLOATS, *_INTEGERS))


@dataclass(frozen=True)
class Encoded:
    """A weight as values and codes.

    Attributes:
        values: ``[outer, 2, inner]``, where ``inner`` counts the values behind the axis that is summed over.
        codes: uint8 ``[outer * inner / 2, 1]``; the places of ``values`` in row-major order, two bits each, lowest first.
    """

    values: Array
    codes: Array


def encode(array: Array, axis: int) -> Encoded | None:
    """Two values and two places for each aligned group of four along ``axis``; None where that would lose a bit.

    That is where a group has more than two values that are not plain zeros (a negative zero is none), or where the number of
    groups is odd or the type has no whole bytes.
    """
    if array.dtype.itemsize not in (1, 2, 4, 8) or array.shape[axis] % 4 or array.size == 0 or array.size % 8:
        return None
    inner = int(np.prod(array.shape[axis + 1 :], dtype=np.int64))
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(-1, 4, inner)
    kept = bits != 0
    if int(kept.sum(axis=1, dtype=np.int8).max()) > 2:
        return None
    # Kept values first, in order; then zeros in order. Stable, so that the same weight always has the same codes.
    places = np.sort(np.argsort(~kept, axis=1, kind="stable")[:, :2], axis=1)
    values = np.take_along_axis(bits, places, axis=1).view(array.dtype)
    quads = places.astype(np.uint8).reshape(-1, 4)
    codes = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    return Encoded(values, codes.reshape(-1, 1))


def decode(encoded: Encoded, shape: tuple[int, ...]) -> Array:
    """The weight of ``shape`` that `encode` was given, bit for bit."""
    outer, _, inner = encoded.values.shape
    places = (encoded.codes >> np.array([[0, 2, 4, 6]], np.uint8)) & 3
    dense = np.zeros((outer, 4, inner), encoded.values.dtype)
    np.put_along_axis(dense, places.reshape(outer, 2, inner).astype(np.int64), encoded.values, axis=1)
    return dense.reshape(shape)


def compact(model: ir.Model) -> tuple[str, ...]:
    """Encode every initializer that is 2:4 along the axis of an op that reads it, in place, where that makes the file smaller.

    Returns:
        Names of the weights that are now compact; each name now stands for the decoder's result.
    """
    graph = model.graph
    chosen: dict[str, Encoded] = {}
    for use in weight_uses(model):
        value, axis = _stored(use), use.axis
        name = "" if value is None else value.name or ""
        if value is None or value.const_value is None or axis is None or name in chosen:
            continue
        if graph.initializers.get(name) is not value or value.is_graph_output() or value.is_graph_input():
            continue
        if value.const_value.dtype not in ENCODED_TYPES:
            continue
        array = value.const_value.numpy()
        encoded = encode(array, axis) if holds(array, axis, 2, 4) else None
        if encoded is None:
            continue
        size = encoded.values.nbytes + encoded.codes.nbytes
        if array.nbytes - size > _DECODER_BYTES + _NAMES_IN_DECODER * len(name):
            chosen[name] = encoded
    if not chosen:
        return ()
    constants = _Constants(model)
    decoders: list[ir.Node] = []
    placed: list[ir.Value] = []
    for name, value in list(graph.initializers.items()):
        graph.initializers.pop(name)
        if name not in chosen:
            placed.append(value)
            continue
        tensor = value.const_value
        assert tensor is not None
        values = _constant(constants.unused(f"{name}.values"), chosen[name].values, tensor.dtype)
        assert values.const_value is not None
        values.const_value.metadata_props.update(tensor.metadata_props)
        codes = _constant(constants.unused(f"{name}.codes"), chosen[name].codes, ir.DataType.UINT8)
        placed += [values, codes]
        nodes = _decoder(name, values, codes, tuple(int(size) for size in tensor.shape.numpy()), constants)
        decoders += nodes
        decoded = nodes[-1].outputs[0]
        value.replace_all_uses_with(decoded)
        decoded.name, decoded.type, decoded.shape = name, value.type, value.shape
    for value in (*placed, *constants.made):
        graph.register_initializer(value)
    first = next(iter(graph), None)
    assert first is not None
    graph.insert_before(first, decoders)
    return tuple(chosen)


def densify(model: ir.Model) -> tuple[str, ...]:
    """Make the weights that `compact` encoded plain initializers again, in place, bit for bit, under their own names.

    The decoders are recognised by their ops, so a file that lost its metadata is restored as well.

    Returns:
        Names of the weights that are plain again.
    """
    graph = model.graph
    restored: dict[str, list[ir.Value]] = {}  # weights by the name of their values; a tool may have joined equal ones
    decoded: set[str] = set()
    for last in [node for node in graph if node.op_type == "Reshape"]:
        found = _match(last)
        if found is None:
            continue
        chain, values, codes, shape = found
        assert values.const_value is not None
        assert codes.const_value is not None
        array = decode(Encoded(values.const_value.numpy(), codes.const_value.numpy()), shape)
        name = last.outputs[0].name or ""
        weight = _constant(name, array, values.const_value.dtype)
        assert weight.const_value is not None
        weight.const_value.metadata_props.update(values.const_value.metadata_props)
        last.outputs[0].replace_all_uses_with(weight)
        last.outputs[0].name = f"{name}.decoded"
        for node in chain:  # what two decoders share goes with the second
            if not any(output.uses() for output in node.outputs):
                graph.remove(node, safe=True)
        restored.setdefault(values.name or "", []).append(weight)
        decoded |= {values.name or "", codes.name or ""}
    for name, value in list(graph.initializers.items()):
        graph.initializers.pop(name)
        for weight in restored.get(name, ()):
            graph.register_initializer(weight)
        if value.uses() or not (name in decoded or name.startswith("sparsefx.compact.")):
            graph.register_initializer(value)
    return tuple(weight.name or "" for weights in restored.values() for weight in weights)


def _stored(use: WeightUse) -> ir.Value | None:
    """The initializer that an op reads, as it is or through DequantizeLinear."""
    producer = use.value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and producer.domain in ("", "ai.onnx"):
        first = producer.inputs[0]
        return first if first is not None and first.is_initializer() else None
    return use.value if use.direct else None


class _Constants:
    """Small constants that decoders share, made on first use where the graph has none of the name and value; and free names."""

    def __init__(self, model: ir.Model) -> None:
        self._there = dict(model.graph.initializers)
        self._shared: dict[str, ir.Value] = {}
        self._taken = {node.name for node in model.graph.all_nodes()}
        self._taken |= {output.name for node in model.graph.all_nodes() for output in node.outputs}
        for graph in model.graphs():
            self._taken |= {value.name for value in (*graph.inputs, *graph.initializers.values())}
        self.made: list[ir.Value] = []

    def unused(self, name: str) -> str:
        """The name itself, or with a number behind it; it is taken from then on."""
        found, number = name, 0
        while found in self._taken:
            number += 1
            found = f"{name}.{number}"
        self._taken.add(found)
        return found

    def get(self, name: str, array: Array, dtype: ir.DataType) -> ir.Value:
        if name not in self._shared:
            there = self._there.get(name)
            self._shared[name] = there if there is not None and _is(there, array, dtype) else self._new(name, array, dtype)
        return self._shared[name]

    def sizes(self, shape: tuple[int, ...]) -> ir.Value:
        text = "x".join(map(str, shape))
        return self.get(f"sparsefx.compact.shape.{text}", np.array(shape, np.int64), ir.DataType.INT64)

    def _new(self, name: str, array: Array, dtype: ir.DataType) -> ir.Value:
        self.made.append(_constant(self.unused(name), array, dtype))
        return self.made[-1]


def _is(value: ir.Value, array: Array, dtype: ir.DataType) -> bool:
    """Whether an initializer holds this and nothing can put another value in its place when the graph runs."""
    tensor = value.const_value
    if tensor is None or tensor.dtype != dtype or value.is_graph_input():
        return False
    found = tensor.numpy()
    return found.shape == array.shape and found.tobytes() == array.tobytes()


def _decoder(name: str, values: ir.Value, codes: ir.Value, shape: tuple[int, ...], constants: _Constants) -> list[ir.Node]:
    assert values.const_value is not None
    outer, _, inner = values.const_value.shape.numpy()
    dtype = values.const_value.dtype
    shifts = constants.get(_SHIFTS, np.array([[0, 2, 4, 6]], np.uint8), ir.DataType.UINT8)
    mask = constants.get(_MASK, np.array(3, np.uint8), ir.DataType.UINT8)
    zero = constants.get(f"sparsefx.compact.zero.{dtype.name}", np.zeros((), dtype.numpy()), dtype)
    nodes: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], attributes: dict[str, int | str] | None = None) -> ir.Value:
        output = constants.unused(f"{name}.{len(nodes)}")
        node = ir.node(op, inputs, attributes or {}, outputs=[ir.Value(name=output)], name=output)
        nodes.append(node)
        return node.outputs[0]

    quads = add("BitwiseAnd", [add("BitShift", [codes, shifts], {"direction": "RIGHT"}), mask])
    places = add("Reshape", [add("Cast", [quads], {"to": int(ir.DataType.INT64)}), constants.sizes((outer, 2, inner))])
    zeros = add("Expand", [zero, constants.sizes((outer, 4, inner))])
    dense = add("ScatterElements", [zeros, places, values], {"axis": 1})
    add("Reshape", [dense, constants.sizes(shape)])
    return nodes


def _match(last: ir.Node) -> tuple[list[ir.Node], ir.Value, ir.Value, tuple[int, ...]] | None:
    """The nodes of a decoder from the last to the first, its values, its codes and the shape; None where it is none."""
    scatter = None if last.outputs[0].is_graph_output() else _behind(last, 0, "ScatterElements")
    zeros = _behind(scatter, 0, "Expand")
    places = _behind(scatter, 1, "Reshape")
    cast = _behind(places, 0, "Cast")
    masked = _behind(cast, 0, "BitwiseAnd")
    shifted = _behind(masked, 0, "BitShift")
    if scatter is None or zeros is None or places is None or cast is None or masked is None or shifted is None:
        return None
    values, codes, shape = scatter.inputs[2], shifted.inputs[0], last.inputs[1]
    others = [zeros.inputs[0], zeros.inputs[1], places.inputs[1], masked.inputs[1], shifted.inputs[1]]
    arrays = [_values_of(value) for value in (values, codes, shape, *others)]
    if any(array is None for array in arrays) or values is None or codes is None:
        return None
    data, packed, sizes, zero, dense_shape, places_shape, mask, shifts = arrays
    assert data is not None
    if data.ndim != 3 or scatter.attributes.get_int("axis", 0) != 1 or zero is None or zero.any() or mask is None or mask != 3:
        return None
    if shifts is None or shifts.tolist() != [[0, 2, 4, 6]] or packed is None or packed.dtype != np.uint8:
        return None
    outer, two, inner = data.shape
    if dense_shape is None or places_shape is None or sizes is None or two != 2 or packed.shape != (outer * inner // 2, 1):
        return None
    if dense_shape.tolist() != [outer, 4, inner] or places_shape.tolist() != [outer, 2, inner]:
        return None
    return [last, scatter, zeros, places, cast, masked, shifted], values, codes, tuple(int(size) for size in sizes)


def _behind(node: ir.Node | None, operand: int, op: str) -> ir.Node | None:
    """The node that makes an operand, where it is of this type and what it makes is no output of the graph."""
    value = node.inputs[operand] if node is not None and operand < len(node.inputs) else None
    producer = value.producer() if value is not None else None
    if value is None or producer is None or producer.op_type != op or value.is_graph_output():
        return None
    return producer


def _values_of(value: ir.Value | None) -> Array | None:
    return value.const_value.numpy() if value is not None and value.is_initializer() and value.const_value is not None else None


def _constant(name: str, array: Array, dtype: ir.DataType) -> ir.Value:
    array = np.require(array, requirements="C")
    tensor = ir.Tensor(array, dtype=dtype, name=name)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
