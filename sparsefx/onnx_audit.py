"""Read an ONNX file and say of each weight which pattern it has and whether Sparse Tensor Cores would take it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common

from sparsefx.errors import ExportError
from sparsefx.passes.onnx_verify import SOURCE_KEY
from sparsefx.passes.onnx_weights import density_of, measured_pattern, output_axis, tensor_core_reason, weight_uses

# Below this many channels on either side, TensorRT has been seen to prefer its dense kernels.
_WORTHWHILE_CHANNELS = 256


@dataclass(frozen=True)
class OnnxWeight:
    """One weight of an ONNX file, as one op reads it.

    Attributes:
        name: of the initializer (joined by ``+`` where an op reads several as one).
        op: ``Conv``, ``ConvTranspose``, ``Gemm``, ``MatMul``, ``LSTM``, ``GRU`` or ``RNN``.
        node: name of the node that reads it.
        axis: the axis along which the op sums.
        shape: of the tensor that the op reads.
        dtype: numpy's name of the element type.
        pattern: ``2:4-transposable``, ``2:4``, ``4:8``, ``8:16`` or empty.
        density: share of non-zero weights.
        source: the PyTorch parameter it came from, where the file says so.
        reason: why Sparse Tensor Cores would not take it; empty where they would.
        note: what may still keep an eligible weight from a sparse kernel; empty where nothing is known to.
    """

    name: str
    op: str
    node: str
    axis: int | None
    shape: tuple[int, ...]
    dtype: str
    pattern: str
    density: float
    source: str
    reason: str
    note: str

    @property
    def eligible(self) -> bool:
        """Whether Sparse Tensor Cores would take the weight. Eligible is not yet picked: see ``note``."""
        return not self.reason


def audit_onnx(path: str | os.PathLike[str]) -> tuple[OnnxWeight, ...]:
    """Every weight of the matrix products, convolutions and recurrent ops in an ONNX file, in graph order.

    Raises:
        ExportError: the file is missing, is no ONNX file, is cut short, or its external data is missing.
    """
    model, sparse = _load(Path(path))
    rows = []
    for use in weight_uses(model):
        array, axis = use.array, use.axis
        shape = () if array is None else tuple(int(size) for size in array.shape)
        reason = tensor_core_reason(use)
        if not sparse.isdisjoint(use.initializers):
            reason = "it is stored as a sparse tensor, which TensorRT rejects; write it as a plain initializer"
        note = ""
        if (
            not reason
            and axis is not None
            and min(shape[axis], shape[output_axis(use.op, axis, len(shape))]) < _WORTHWHILE_CHANNELS
        ):
            note = f"fewer than about {_WORTHWHILE_CHANNELS} channels on one side: TensorRT may find its dense kernel faster"
        if not reason and array is not None and array.dtype.name == "float32":
            note = "; ".join(filter(None, (note, "build with FP16, BF16 or INT8 allowed: float32 has no sparse kernel")))
        tensors = [model.graph.initializers[name].const_value for name in use.initializers if name in model.graph.initializers]
        sources = [tensor.metadata_props.get(SOURCE_KEY, "") for tensor in tensors if tensor is not None]
        rows.append(
            OnnxWeight(
                name="+".join(use.initializers),
                op=use.op,
                node=use.node,
                axis=axis,
                shape=shape,
                dtype="" if array is None else array.dtype.name,
                pattern=measured_pattern(use),
                density=1.0 if array is None else density_of(array),
                source="+".join(filter(None, sources)),
                reason=reason,
                note=note,
            )
        )
    return tuple(rows)


def _load(path: Path) -> tuple[ir.Model, frozenset[str]]:
    """The model, with every tensor readable, and the names of what it stores as sparse tensors; or an ExportError."""
    if path.is_dir():
        raise ExportError(f"{path}: this is a directory; give the path of an ONNX file")
    if not path.exists():
        raise ExportError(f"{path}: no such file; give the path of an ONNX file")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        sparse = _densify(proto.graph)
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
    except OSError as error:
        raise ExportError(f"{path}: the file could not be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf's own errors share no base class that is public
        raise ExportError(
            f"{path}: this is not an ONNX file, or it is cut short ({type(error).__name__}); export it again"
        ) from error
    if not model.opset_imports or (not len(model.graph) and not model.graph.outputs):
        raise ExportError(f"{path}: this is not an ONNX file, or it is empty: it holds no graph; export it again")
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            location = path.parent / tensor.location
            needed = (tensor.offset or 0) + tensor.nbytes
            if not location.is_file():
                raise ExportError(f"{path}: its external data file {tensor.location!r} is missing; put it beside the model")
            if location.stat().st_size < needed:
                raise ExportError(
                    f"{path}: its external data file {tensor.location!r} is cut short: initializer {name!r} needs "
                    f"{needed} bytes and there are {location.stat().st_size}; export it again"
                )
        elif tensor is not None:
            try:
                tensor.numpy()
            except Exception as error:
                raise ExportError(f"{path}: initializer {name!r} cannot be read: {_line(error)}; export it again") from error
    if model.functions:
        ir.passes.common.InlinePass()(model)
    return model, frozenset(sparse)


def _densify(graph: onnx.GraphProto) -> set[str]:
    """Write the graph's sparse tensors out as dense ones, in place, so that their pattern can be measured; their names."""
    names = {tensor.values.name for tensor in graph.sparse_initializer}
    graph.initializer.extend(_dense(tensor) for tensor in graph.sparse_initializer)
    del graph.sparse_initializer[:]
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                names |= _densify(subgraph)
            if node.op_type == "Constant" and attribute.name == "sparse_value":
                attribute.CopyFrom(onnx.helper.make_attribute("value", _dense(attribute.sparse_tensor)))
                names.add(node.output[0])
    return names


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values, indices = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
    array = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        array.reshape(-1)[indices] = values
    else:
        array[tuple(indices.T)] = values
    return onnx.numpy_helper.from_array(array, sparse.values.name)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
