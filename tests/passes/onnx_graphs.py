"""ONNX graphs written node by node, as other tools write them, for tests of what reads foreign files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def two_of_four(shape: tuple[int, ...], axis: int, dtype: str = "float32") -> np.ndarray:
    """Random values, 2:4 along ``axis`` and (almost surely) not along the other axes."""
    values = np.random.default_rng(0).normal(size=shape) + 10
    moved = np.moveaxis(values, axis, -1).copy()
    order = np.random.default_rng(1).random((*moved.shape[:-1], moved.shape[-1] // 4, 4)).argsort(-1)
    mask = (order < 2).reshape(moved.shape)
    return np.ascontiguousarray(np.moveaxis(moved * mask, -1, axis)).astype(dtype)


def save(
    path: Path,
    nodes: list[Any],
    initializers: dict[str, np.ndarray],
    inputs: dict[str, list[Any]],
    *,
    opset: int = 20,
    **options: Any,
) -> Path:
    """Write a graph with float inputs and one float output ``y`` of any shape."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
        **options,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path
