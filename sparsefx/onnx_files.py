"""Rewrite ONNX files between plain and compact weights; a file appears whole and checked, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from sparsefx.errors import ExportError
from sparsefx.passes.compact_weights import OLDEST_OPSET, compact, densify
from sparsefx.passes.onnx_check import check_standard
from sparsefx.passes.onnx_read import load_data, read_onnx
from sparsefx.passes.onnx_write import check_destination, destination_of, write_checked


@dataclass(frozen=True)
class RewriteReport:
    """What became of a file.

    Attributes:
        path: of the file written.
        weights: names of the weights whose encoding changed.
        bytes_before: size of the file read, external data included.
        bytes: size of the file written, likewise.
    """

    path: str
    weights: tuple[str, ...]
    bytes_before: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.path}: {len(self.weights)} weights rewritten, {self.bytes_before / 1e6:.2f} MB -> {self.bytes / 1e6:.2f} MB"
        )


def densify_onnx(path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> RewriteReport:
    """Restore the plain initializers of a file that was exported with ``weights="compact"``, bit for bit.

    A file without compact weights keeps its content.

    Args:
        path: of the file.
        out: where to write; None replaces the file itself, in one step and only when the new one was checked.

    Raises:
        ExportError: the file cannot be read, or the new one cannot be written.
    """
    return _rewrite(path, out, densify)


def compact_onnx(path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> RewriteReport:
    """Encode the 2:4 weights of any ONNX file as values and 4-bit codes; `densify_onnx` undoes it bit for bit.

    Args:
        path: of the file, of opset 18 or later.
        out: where to write; None replaces the file itself, in one step and only when the new one was checked.

    Raises:
        ExportError: the file cannot be read, its opset is older, or the new one cannot be written.
    """
    return _rewrite(path, out, _compact_checked)


def _compact_checked(model: ir.Model) -> tuple[str, ...]:
    opset = model.opset_imports.get("", 0) or model.opset_imports.get("ai.onnx", 0)
    if opset < OLDEST_OPSET:
        raise ExportError(
            f"the file has opset {opset}, and the compact encoding needs {OLDEST_OPSET} or later; export it again with that opset"
        )
    return compact(model)


def _rewrite(
    path: str | os.PathLike[str], out: str | os.PathLike[str] | None, change: Callable[[ir.Model], tuple[str, ...]]
) -> RewriteReport:
    source = destination_of(path)
    target = source if out is None else destination_of(out)
    check_destination(target)
    model, _ = read_onnx(source)
    before = _size_on_disk(source, model)
    load_data(model)
    _detach(model)
    weights = change(model)
    if not weights and out is None:
        return RewriteReport(str(target), (), before, before)
    size = write_checked(model, target, check_standard if _is_standard(source) else _check_readable)
    return RewriteReport(str(target), weights, before, size)


def _is_standard(path: Path) -> bool:
    """Whether a file passes ``onnx.checker``; what a foreign file breaks already cannot be asked of its successor."""
    try:
        check_standard(path)
    except ExportError:
        return False
    return True


def _check_readable(path: Path) -> None:
    read_onnx(path)


def _detach(model: ir.Model) -> None:
    """Take tensors with metadata out of the message they were read from, in place: written back, it would be doubled."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.metadata_props and isinstance(tensor, ir.TensorProtoTensor):
            value.const_value = ir.Tensor(
                tensor.numpy(),
                dtype=tensor.dtype,
                name=tensor.name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )


def _size_on_disk(path: Path, model: ir.Model) -> int:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    data = {Path(tensor.base_dir) / tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return path.stat().st_size + sum(file.stat().st_size for file in data)
