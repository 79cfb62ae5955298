"""Read an ONNX file and say of each weight which pattern it has and whether Sparse Tensor Cores would take it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common

from sparsefx.passes.compact_weights import ENCODED_TYPES, densify
from sparsefx.passes.onnx_read import read_onnx
from sparsefx.passes.onnx_verify import SOURCE_KEY
from sparsefx.passes.onnx_weights import (
    WeightUse,
    density_of,
    is_quantised,
    measured_pattern,
    output_axis,
    tensor_core_reason,
    weight_uses,
)
from sparsefx.passes.pad_channels import PADDED_KEY, padded_size
from sparsefx.passes.tensorrt_rules import build_condition, obstacle_to_picking, stored_bytes


@dataclass(frozen=True)
class OnnxWeight:
    """One weight of an ONNX file, as one op reads it.

    Attributes:
        name: of the initializer (joined by ``+`` where an op reads several as one).
        op: ``Conv``, ``ConvTranspose``, ``Gemm``, ``MatMul``, ``LSTM``, ``GRU`` or ``RNN``.
        node: name of the node that reads it.
        axis: the axis along which the op sums.
        shape: of the tensor that the op reads.
        dtype: numpy's name of the element type as stored: ``int8`` for a weight behind DequantizeLinear.
        pattern: ``2:4-transposable``, ``2:4``, ``4:8``, ``8:16`` or empty.
        density: share of non-zero weights.
        source: the PyTorch parameter it came from, where the file says so.
        reason: why Sparse Tensor Cores would not take it; empty where they would.
        likely_picked: whether TensorRT would likely choose its sparse kernel, by channels, kernel and type.
        note: why an eligible weight would likely not be picked, what the build needs for it, or that its inputs are padded or
            could be; may be empty.
        bytes: size of the data in each encoding: ``plain``, ``compact``, ``sparse_initializer``; see `stored_bytes`.
        encoding: how the file stores it: ``plain``, ``compact``, ``sparse`` or, for what is no initializer, ``computed``.
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
    likely_picked: bool
    note: str
    bytes: dict[str, int | None]
    encoding: str

    @property
    def eligible(self) -> bool:
        """Whether Sparse Tensor Cores would take the weight. Eligible is not yet picked: see ``likely_picked``."""
        return not self.reason


def audit_onnx(path: str | os.PathLike[str]) -> tuple[OnnxWeight, ...]:
    """Every weight of the matrix products, convolutions and recurrent ops in an ONNX file, in graph order.

    Raises:
        ExportError: the file is missing, is no ONNX file, is cut short, or its external data is missing.
    """
    model, sparse = read_onnx(path, densify=True)
    if model.functions:
        ir.passes.common.InlinePass()(model)
    compact = frozenset(densify(model))
    return tuple(_row(use, sparse, compact) for use in weight_uses(model))


def _row(use: WeightUse, sparse: frozenset[str], compact: frozenset[str]) -> OnnxWeight:
    array, axis = use.array, use.axis
    shape = () if array is None else tuple(int(size) for size in array.shape)
    stored = next(iter(use.stored), None)
    dtype = np.dtype(stored.dtype.numpy()) if stored is not None else (np.dtype(np.void) if array is None else array.dtype)
    pattern = measured_pattern(use)
    reason, encoding = tensor_core_reason(use), "plain" if use.stored else "computed"
    if not sparse.isdisjoint(use.initializers):
        encoding = "sparse"
        reason = "it is stored as a sparse tensor, which TensorRT rejects; write it as a plain initializer"
    elif not compact.isdisjoint(use.initializers):
        encoding = "compact"
        reason = reason or "it is in the compact encoding, which TensorRT does not take for a weight; run sparsefx densify first"
    picked, note = _prediction(use, shape, dtype.name, reason)
    sources = [tensor.metadata_props.get(SOURCE_KEY, "") for tensor in use.stored]
    note = "; ".join(filter(None, (note, _padding(use, stored, encoding))))
    bits = 8 * dtype.itemsize if stored is None else stored.dtype.bitwidth
    # Zeros that are not stored as zeros cannot be left out.
    encodes = pattern.startswith("2:4") and not use.problem and stored is not None and stored.dtype in ENCODED_TYPES
    nonzero = 0 if array is None else int(np.count_nonzero(array != 0))
    return OnnxWeight(
        name="+".join(use.initializers),
        op=use.op,
        node=use.node,
        axis=axis,
        shape=shape,
        dtype="" if array is None else dtype.name,
        pattern=pattern,
        density=1.0 if array is None else density_of(array),
        source="+".join(filter(None, sources)),
        reason=reason,
        likely_picked=picked,
        note=note,
        bytes=stored_bytes(shape, bits, nonzero, encodes=encodes) if array is not None else {},
        encoding=encoding,
    )


def _prediction(use: WeightUse, shape: tuple[int, ...], dtype: str, reason: str) -> tuple[bool, str]:
    """Whether TensorRT would likely pick its sparse kernel, and why not or on what condition."""
    if reason or use.axis is None:
        return False, ""
    outputs = output_axis(use.op, use.axis, len(shape))
    taps = math.prod(shape[2:]) if "Conv" in use.op else 1
    obstacle = obstacle_to_picking(shape[use.axis], shape[outputs], taps)
    condition = build_condition(dtype, quantised=is_quantised(use.value))
    return not obstacle, "; ".join(filter(None, (obstacle, condition)))


def _padding(use: WeightUse, stored: ir.TensorProtocol | None, encoding: str) -> str:
    """That the inputs of a weight were padded, or could be so that it becomes eligible."""
    before = "" if stored is None else stored.metadata_props.get(PADDED_KEY, "")
    if before:
        return f"its {before} inputs were padded with zeros; the Pad in front of it is a layer of its own"
    size = padded_size(use) if encoding == "plain" and use.direct and tensor_core_reason(use) else None
    return "" if size is None else f"with {size} inputs, the rest zeros, it would be 2:4: export with pad_channels=True"
