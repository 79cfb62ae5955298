"""Find the weights of an ONNX graph: which op reads each, along which axis that op sums, and what pattern it has there.

This is the one place that knows reduction axes in ONNX; both the lowering and the audit of a foreign file use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir

from sparsefx.passes.tensor_cores import shape_refusal

Array = np.ndarray  # ml_dtypes' bfloat16 included, so the element type stays open

RECURRENT_OPS = ("LSTM", "GRU", "RNN")
_QUANTISERS = ("DequantizeLinear", "QuantizeLinear")
_OLDEST_EVALUATED_QUANTISERS = 19
_ASYMMETRIC = "its quantisation is asymmetric; sparse kernels need a zero point of zero"

# Which inputs of an op can be weights.
_OPERANDS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "ConvInteger"), (1,)),
    **dict.fromkeys(("Gemm", "MatMul", "MatMulInteger"), (0, 1)),
    **dict.fromkeys(RECURRENT_OPS, (1, 2)),
    "QLinearConv": (3,),
    "QLinearMatMul": (0, 3),
}

# Ops that move, cast or rescale weights without mixing them. Anything else between an initializer and the op that
# reads it is not followed: the weight is reported as computed in the graph.
_MOVING_OPS = ("Identity", "Cast", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat")
_TRANSPARENT_OPS = frozenset((*_MOVING_OPS, *_QUANTISERS, "Constant"))

_DRAWING_OPS = ("RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")

# Where ops on whole numbers have the zero point of an operand, and the axis of the operand along which it may run.
_ZERO_POINTS = {
    ("ConvInteger", 1): (3, 0),
    ("QLinearConv", 3): (5, 0),
    **{("MatMulInteger", operand): (2 + operand, -2 + operand) for operand in (0, 1)},
    **{("QLinearMatMul", operand): (operand + 2, axis) for operand, axis in ((0, -2), (3, -1))},
}

# From the most specific to the least; the first that holds is the one reported.
_MEASURED_PATTERNS = ((2, 4), (4, 8), (8, 16))


@dataclass(frozen=True, eq=False)
class WeightUse:
    """One weight operand of one op.

    Attributes:
        op: op type.
        node: the node's name.
        operand: index among the node's inputs.
        value: the operand itself.
        axis: reduction axis of the operand; None where the op is not known to reduce over it.
        initializers: names of the floating-point or integer tensors it is made from, in graph order.
        direct: the op reads the initializer itself, with nothing in front.
        array: the values the op reads; None where they are not constant or not followed.
        problem: why ``array`` is None, or what keeps the weight from being a plain one; empty otherwise.
        groups: of a convolution.
        stored: the tensors of those among ``initializers`` that are initializers, in whichever graph they stand.
    """

    op: str
    node: str
    operand: int
    value: ir.Value
    axis: int | None
    initializers: tuple[str, ...]
    direct: bool
    array: Array | None
    problem: str
    groups: int = 1
    stored: tuple[ir.TensorProtocol, ...] = ()


def reduction_axis(node: ir.Node, operand: int, rank: int) -> int | None:
    """The axis of ``node``'s input ``operand``, of ``rank`` axes, over which the op sums; None where it has none.

    Conv ``[K, C, R, S]`` sums over axis 1, ConvTranspose ``[C, K, R, S]`` over axis 0, MatMul's right side ``[..., K, N]``
    over the second last axis and its left side over the last, Gemm according to transA and transB, and the
    weights of LSTM, GRU and RNN, ``[directions, gates * hidden, in]``, over axis 2.
    """
    op = node.op_type
    if not _is_standard(node) or operand not in _OPERANDS.get(op, ()):
        return None
    if op in RECURRENT_OPS:
        return 2
    if "Conv" in op:
        return 0 if op == "ConvTranspose" else 1
    if op == "Gemm":
        transposed = node.attributes.get_int("transA" if operand == 0 else "transB", 0)
        return (0 if transposed else 1) if operand == 0 else (1 if transposed else 0)
    if rank == 1:
        return 0
    return rank - 1 if operand == 0 else rank - 2


def weight_uses(model: ir.Model) -> Iterator[WeightUse]:
    """Every constant operand of a matrix product, convolution or recurrent op, in graph order, subgraphs included.

    Ops outside the standard (fused ones that onnxruntime writes) are listed too, with no axis, where they read a constant
    of two or more axes.
    """
    opset = model.opset_imports.get("", 0) or model.opset_imports.get("ai.onnx", 0)
    constant = _constant_values(model.graph)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        standard = _is_standard(node)
        for operand in _OPERANDS.get(node.op_type, ()) if standard else range(len(node.inputs)):
            if operand >= len(node.inputs) or node.inputs[operand] is None:
                continue
            value = node.inputs[operand]
            assert value is not None
            if id(value) not in constant:
                continue  # an activation
            origins, problem = _origins(value)
            array = None if problem and "Constant" not in problem else _evaluate(value, opset, {})
            if array is None and not problem:
                problem = "its values could not be computed from the file"
            rank = array.ndim if array is not None else len(value.shape or ())
            known = array is not None or value.shape is not None
            if rank < 2 and (operand == 0 or not standard):
                continue
            if problem == "" and array is not None:
                problem = _asymmetric(value, opset)
            if array is not None and standard:
                array, problem = _without_zero_point(node, operand, array, problem, opset)
            yield WeightUse(
                op=node.op_type,
                node=node.name or "",
                operand=operand,
                value=value,
                axis=reduction_axis(node, operand, rank) if known else None,
                initializers=tuple(origin.name or "" for origin in origins),
                direct=value.is_initializer(),
                array=array,
                problem=problem,
                groups=node.attributes.get_int("group", 1) if "Conv" in node.op_type else 1,
                stored=tuple(
                    origin.const_value for origin in origins if origin.is_initializer() and origin.const_value is not None
                ),
            )


def holds(array: Array, axis: int, keep: int, size: int) -> bool:
    """Whether each aligned group of ``size`` along ``axis`` has at most ``keep`` non-zeros."""
    length = array.shape[axis]
    if length % size:
        return False
    nonzero = np.moveaxis(array != 0, axis, -1)
    groups = nonzero.reshape(*nonzero.shape[:-1], length // size, size)
    return bool((np.count_nonzero(groups, axis=-1) <= keep).all())


def with_zeros(array: Array, axis: int, size: int) -> Array:
    """The array with zeros behind its last entry along ``axis``, ``size`` entries in all."""
    return np.pad(array, [(0, size - length if place == axis else 0) for place, length in enumerate(array.shape)])


def broken_groups(array: Array, axis: int, keep: int, size: int) -> tuple[int, int]:
    """How many aligned groups along ``axis`` have more than ``keep`` non-zeros, and how many there are."""
    length = array.shape[axis] - array.shape[axis] % size
    nonzero = np.moveaxis(array != 0, axis, -1)[..., :length]
    counts = np.count_nonzero(nonzero.reshape(*nonzero.shape[:-1], length // size, size), axis=-1)
    return int((counts > keep).sum()), int(counts.size)


def output_axis(op: str, axis: int, rank: int) -> int:
    """The axis of a weight that counts the op's outputs, where ``axis`` is the one it sums over."""
    return 1 - axis if "Conv" in op or rank < 2 else 2 * rank - 3 - axis


def measured_pattern(use: WeightUse) -> str:
    """The N:M pattern that a weight's values have along its reduction axis, or an empty text.

    ``2:4-transposable`` where 2:4 also holds along the axis of the outputs.
    """
    array, axis = use.array, use.axis
    if array is None or axis is None or not array.size:
        return ""
    for keep, size in _MEASURED_PATTERNS:
        if _holds_in_each_group(use, array, axis, keep, size):
            outputs = output_axis(use.op, axis, array.ndim)
            if (keep, size) == (2, 4) and array.ndim > 1 and _holds_in_each_group(use, array, outputs, 2, 4):
                return "2:4-transposable"
            return f"{keep}:{size}"
    return ""


def _holds_in_each_group(use: WeightUse, array: Array, axis: int, keep: int, size: int) -> bool:
    """As `holds`, where no N:M group reaches from one group of a convolution, which lie along axis 0, into the next."""
    straddles = axis == 0 and use.groups > 1 and (array.shape[0] % use.groups or array.shape[0] // use.groups % size)
    return not straddles and holds(array, axis, keep, size)


def density_of(array: Array) -> float:
    """Share of values that are not zero; 0 for an empty tensor."""
    return float(np.count_nonzero(array != 0)) / array.size if array.size else 0.0


def tensor_core_reason(use: WeightUse) -> str:
    """Why Sparse Tensor Cores would not take this weight, in words; empty where they would.

    The rule is TensorRT's: a plain initializer, 2:4 along the axis the op sums over. On top of it stands the rule of
    thumb of the tools that prepare weights for it: at least 16 inputs in steps of 16, and outputs in steps of 8.
    """
    if use.problem:
        return use.problem
    array, axis = use.array, use.axis
    assert array is not None
    if not array.size:
        return "it holds no value"
    small = next((tensor.dtype.name.lower() for tensor in use.stored if tensor.dtype.bitwidth < 8), "")
    if small:
        return f"{small} weights have no sparse kernel; quantise to INT8"
    if axis is None:
        return f"{use.op} is not known to sum over an axis of this weight"
    if use.op in RECURRENT_OPS:
        return f"{use.op} has no sparse kernel; only convolutions and matrix products do"
    if use.op in ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"):
        return f"{use.op} is not read by TensorRT; write the weight with QuantizeLinear and DequantizeLinear around the plain op"
    if use.op == "ConvTranspose":
        return "no sparse kernel for ConvTranspose is documented"
    if array.dtype.name in ("float64", "complex64", "complex128"):
        return f"{array.dtype.name} weights have no sparse kernel; export in float32, float16 or bfloat16"
    inputs = array.shape[axis]
    if inputs % 4:
        return f"{inputs} values along axis {axis} are not a multiple of 4"
    broken, total = broken_groups(array, axis, 2, 4)
    if broken:
        return f"not 2:4 along axis {axis}: {broken} of {total} groups of four have more than two non-zeros"
    outputs = array.shape[output_axis(use.op, axis, array.ndim)] if array.ndim > 1 else 1
    return shape_refusal(inputs, outputs, use.groups)


def is_quantised(value: ir.Value) -> bool:
    """Whether a constant passes through QuantizeLinear or DequantizeLinear on its way to the op that reads it."""
    producer = value.producer()
    while producer is not None:
        if producer.op_type in _QUANTISERS:
            return True
        first = producer.inputs[0] if producer.inputs else None
        producer = None if first is None else first.producer()
    return False


def _is_standard(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx")


def _constant_values(graph: ir.Graph) -> set[int]:
    """``id`` of every value that does not depend on the graph's inputs, nested graphs included: one walk, first node first."""
    constant: set[int] = set()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        operands = [operand for operand in node.inputs if operand is not None]
        constant.update(id(operand) for operand in operands if operand.is_initializer())
        alone = node.op_type == "Constant" or (bool(operands) and node.op_type not in _DRAWING_OPS)
        if alone and all(id(operand) in constant or operand.is_initializer() for operand in (*operands, *_captured(node))):
            constant.update(id(output) for output in node.outputs)
    return constant


def _captured(node: ir.Node) -> list[ir.Value]:
    """The values from outside that the graphs within a node (the branches of an If, the body of a Loop) read."""
    inside: set[int] = set()
    read: list[ir.Value] = []
    pending = [node]
    while pending:
        for attribute in pending.pop().attributes.values():
            for graph in _graphs_of(attribute):
                inside.update(id(value) for value in (*graph.inputs, *graph.initializers.values()))
                read.extend(list(graph.outputs))
                for inner in graph:
                    inside.update(id(value) for value in inner.outputs)
                    read += [value for value in inner.inputs if value is not None]
                    pending.append(inner)
    return [value for value in read if id(value) not in inside]


def _graphs_of(attribute: ir.Attr) -> tuple[ir.Graph, ...]:
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else ()


def _origins(value: ir.Value) -> tuple[tuple[ir.Value, ...], str]:
    """The initializers and Constant nodes' values that a constant is made from, and why it is not a plain weight."""
    found: list[ir.Value] = []
    problems: list[str] = []
    seen: set[int] = set()
    pending = [(value, True)]
    while pending:
        current, data = pending.pop()  # only data operands (not shapes, axes, scales) count
        if id(current) in seen:
            continue
        seen.add(id(current))
        producer = current.producer()
        if current.is_initializer():  # in old files an initializer is also listed as an input
            if data and current.name:
                found.append(current)
        elif producer is not None and producer.op_type == "Constant":
            if data:
                found.append(current)
                problems.append("it is a Constant node; sparse kernels take plain initializers only")
        elif producer is not None:
            if producer.op_type not in _TRANSPARENT_OPS:
                problems.append(f"it is computed in the graph by {producer.op_type}, which sparse kernels do not see through")
            operands = [
                (operand, data and (position == 0 or producer.op_type == "Concat"))
                for position, operand in enumerate(producer.inputs)
                if operand is not None
            ]
            pending.extend(reversed(operands))
    return tuple(found), problems[0] if problems else ""


def _evaluate(value: ir.Value, opset: int, known: dict[int, Array | None]) -> Array | None:
    """The values of a constant behind transparent ops; None where a tensor is missing or an op cannot be evaluated."""
    if id(value) in known:
        return known[id(value)]
    result: Array | None = None
    producer = value.producer()
    if value.is_initializer():
        result = None if value.const_value is None else value.const_value.numpy()
    elif producer is not None and producer.op_type == "Constant" and _is_tensor(producer.attributes.get("value")):
        result = producer.attributes["value"].as_tensor().numpy()  # which may lie in external data
    elif producer is not None and producer.op_type in _TRANSPARENT_OPS:
        names = [f"i{index}" if operand is not None else "" for index, operand in enumerate(producer.inputs)]
        arrays = [None if operand is None else _evaluate(operand, opset, known) for operand in producer.inputs]
        if all(array is not None for operand, array in zip(producer.inputs, arrays, strict=True) if operand is not None):
            proto = ir.serde.serialize_node(producer)
            del proto.input[:], proto.output[:]
            proto.input.extend(names)
            proto.output.extend(f"o{index}" for index in range(len(producer.outputs)))
            graph = onnx.helper.make_graph(
                [proto],
                "constant",
                [onnx.ValueInfoProto(name=name) for name in names if name],
                [onnx.ValueInfoProto(name=f"o{value.index()}")],
            )
            version = opset or 18
            if producer.op_type in _QUANTISERS:
                # onnx evaluates these from version 19 on; earlier versions mean the same, with fewer types.
                version = max(version, _OLDEST_EVALUATED_QUANTISERS)
            model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)])
            try:
                evaluator = onnx.reference.ReferenceEvaluator(model)
                result = evaluator.run(None, {name: array for name, array in zip(names, arrays, strict=True) if name})[0]  # type: ignore[index]
            except Exception:  # a foreign file may hold anything here: the weight is then reported as not followed
                result = None
    known[id(value)] = result
    return result


def _without_zero_point(node: ir.Node, operand: int, array: Array, problem: str, opset: int) -> tuple[Array, str]:
    """What the whole numbers that an op reads stand for, up to their scale; and the problem, where zero is no zero."""
    place, axis = _ZERO_POINTS.get((node.op_type, operand), (0, 0))
    point = node.inputs[place] if 0 < place < len(node.inputs) else None
    zero = None if point is None else _evaluate(point, opset, {})
    if zero is None or not (zero != 0).any():
        return array, problem
    if zero.ndim == 1 and zero.size > 1:
        zero = zero.reshape([-1 if index == axis % array.ndim else 1 for index in range(array.ndim)])
    return array.astype(np.int32) - zero.astype(np.int32), problem or _ASYMMETRIC


def _is_tensor(attribute: ir.Attr | None) -> bool:
    return attribute is not None and attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref()


def _asymmetric(value: ir.Value, opset: int) -> str:
    """A text where an integer weight has a zero point other than zero, which turns its zeros into non-zeros."""
    producer = value.producer()
    while producer is not None and producer.inputs and producer.inputs[0] is not None:
        if producer.op_type in _QUANTISERS and len(producer.inputs) > 2:
            zero_point = producer.inputs[2]
            array = None if zero_point is None else _evaluate(zero_point, opset, {})
            if array is not None and bool((array != 0).any()):
                return _ASYMMETRIC
        producer = producer.inputs[0].producer()
    return ""
