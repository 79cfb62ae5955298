"""Check a bfloat16 file without a runtime that has bfloat16 kernels: by its twin in float32.

onnxruntime has no CPU kernels for bfloat16. Every bfloat16 number is a float32 number, so the same graph with the same values
in float32 has to equal the same model in float32, and within the tolerance of float32: a wrong weight, axis or op shows
more clearly there than it would through bfloat16's rounding. What the twin cannot show is how the target rounds.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsefx.errors import ExportError
from sparsefx.passes.onnx_inputs import Inputs

_BFLOAT16, _FLOAT = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type")
_FOLDED_INTO = ("Conv", "ConvTranspose", "Gemm")


def round_folded(model: ir.Model) -> None:
    """Give weights into which the optimizer folded a BatchNorm the type of the bfloat16 inputs beside them, in place.

    The folding computes in float32 and leaves its result so, which the standard does not allow beside bfloat16.
    """
    for node in model.graph.all_nodes():
        if node.op_type not in _FOLDED_INTO or node.inputs[0] is None:
            continue
        if node.inputs[0].dtype != ir.DataType.BFLOAT16:
            continue
        for value in node.inputs[1:]:
            if value is not None and value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
                array = value.const_value.numpy().astype(ml_dtypes.bfloat16)
                value.const_value = ir.Tensor(array, dtype=ir.DataType.BFLOAT16, name=value.name)
                value.dtype = ir.DataType.BFLOAT16


def write_float32_twin(path: Path, twin: Path) -> None:
    """Write the file at ``path`` with every bfloat16 value, input, output and cast in float32; data stands in the file itself
    or, above the limit of one file, beside it.
    """
    model = onnx.load(path)
    _convert(model)
    large = model.ByteSize() > 2**31 - 2**24
    onnx.save(model, twin, save_as_external_data=large, location=f"{twin.name}.data")


def float32_model(model: nn.Module) -> nn.Module:
    """A copy of a model in float32, in eval mode.

    Raises:
        ExportError: the model cannot be copied.
    """
    try:
        return copy.deepcopy(model).float().eval()
    except Exception as error:  # whatever a user's class raises when it is copied
        raise ExportError(
            f"the bfloat16 file is checked by a float32 copy of the model, and the model cannot be copied "
            f"({type(error).__name__}: {error}); export model.float() or model.half()"
        ) from error


def float32_inputs(inputs: Inputs) -> Inputs:
    """The inputs with every bfloat16 tensor in float32."""

    def convert(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 else leaf

    args, kwargs = pytree.tree_map(convert, inputs)
    return tuple(args), dict(kwargs)


def _convert(message: Any) -> None:
    """Rewrite a protobuf message and all within it, in place."""
    if isinstance(message, onnx.TensorProto):
        if message.data_type == _BFLOAT16:
            array = onnx.numpy_helper.to_array(message).astype(np.float32)
            kept = message.name
            message.CopyFrom(onnx.numpy_helper.from_array(array, kept))
        return
    if isinstance(message, onnx.TypeProto.Tensor) and message.elem_type == _BFLOAT16:
        message.elem_type = _FLOAT
    if isinstance(message, onnx.AttributeProto) and message.name in _TYPE_ATTRIBUTES and message.i == _BFLOAT16:
        message.i = _FLOAT
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                _convert(part)
