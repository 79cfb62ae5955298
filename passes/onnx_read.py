"""Read an ONNX file of any origin, with every tensor readable, or say in one line what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from sparsefx.errors import ExportError


def read_onnx(path: str | os.PathLike[str], *, densify: bool = False) -> tuple[ir.Model, frozenset[str]]:
    """The model in a file, its external data checked but not loaded yet.

    Args:
        path: of the file.
        densify: write sparse tensors (``sparse_initializer``, ``sparse_value``) out as dense ones, so that their pattern can
            be measured; otherwise they are refused, since the intermediate form used here cannot hold them.

    Returns:
        The model, and the names of what it stores as sparse tensors.

    Raises:
        ExportError: the file is missing, is no ONNX file, is cut short, is newer than what is understood here, or its
            external data is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise ExportError(f"{path}: this is a directory; give the path of an ONNX file")
    if not path.exists():
        raise ExportError(f"{path}: no such file; give the path of an ONNX file")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        _check_versions(path, proto)
        sparse = _densify(proto.graph)
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
    except ExportError:
        raise
    except OSError as error:
        raise ExportError(f"{path}: the file could not be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf's own errors share no base class that is public
        raise ExportError(
            f"{path}: this is not an ONNX file, or it is cut short ({type(error).__name__}); export it again"
        ) from error
    if not model.opset_imports or (not len(model.graph) and not model.graph.outputs):
        raise ExportError(f"{path}: this is not an ONNX file, or it is empty: it holds no graph; export it again")
    if sparse and not densify:
        raise ExportError(
            f"{path}: it stores {', '.join(sorted(sparse)[:3])} as sparse tensors, which most tools cannot read; export the "
            f"model again with plain weights"
        )
    _check_tensors(path, model)
    return model, frozenset(sparse)


def load_data(model: ir.Model) -> None:
    """Read what lies beside the file into memory, in place, with what each tensor's metadata says."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    tensors = [value.const_value for value in values]
    ir.external_data.load_to_model(model)
    for value, tensor in zip(values, tensors, strict=True):
        if value.const_value is not None and tensor is not None and value.const_value is not tensor:
            value.const_value.doc_string = tensor.doc_string
            value.const_value.metadata_props.update(tensor.metadata_props)
    holders: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for holder in holders:
        for node in ir.traversal.RecursiveGraphIterator(holder):
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    constant = attribute.as_tensor()
                    if isinstance(constant, ir.ExternalTensor):
                        copied = ir.Tensor(constant.numpy().copy(), dtype=constant.dtype, name=constant.name)
                        node.attributes[name] = ir.AttrTensor(name, copied)


def _check_versions(path: Path, proto: onnx.ModelProto) -> None:
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and not 1 <= entry.version <= newest:
            raise ExportError(
                f"{path}: it uses version {entry.version} of the ONNX operator set, and versions 1 to {newest} are known here; "
                f"export it with one of these, or update the onnx package"
            )


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol | None]]:
    """Every initializer and constant of the graph, of graphs inside it and of functions, by name."""
    seen: set[int] = set()
    holders: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for holder in holders:
        graphs = [holder] if isinstance(holder, ir.Graph) else []
        for node in ir.traversal.RecursiveGraphIterator(holder):
            if isinstance(node.graph, ir.Graph):
                graphs.append(node.graph)
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield node.outputs[0].name or node.op_type, attribute.as_tensor()
        for graph in graphs:
            if id(graph) not in seen:
                seen.add(id(graph))
                yield from ((name, value.const_value) for name, value in graph.initializers.items())


def _check_tensors(path: Path, model: ir.Model) -> None:
    for name, tensor in _tensors(model):
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


def _densify(graph: onnx.GraphProto) -> set[str]:
    """Write the graph's sparse tensors out as dense ones, in place; their names."""
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
