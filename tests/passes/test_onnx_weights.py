"""Weights of foreign graphs: quantised ones of every opset, shapes that nobody stated, and groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from onnx_graphs import save, two_of_four

from sparsefx.onnx_audit import audit_onnx


@pytest.mark.parametrize("opset", [10, 12, 13, 18, 19, 21, 23])
@pytest.mark.parametrize(("zero_point", "eligible"), [(0, True), (3, False)])
def test_int8_weights_are_read_at_every_opset(tmp_path: Path, opset: int, zero_point: int, eligible: bool) -> None:
    nodes = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"]), helper.make_node("MatMul", ["x", "d"], ["y"])]
    tensors = {"w": two_of_four((16, 32), 0, "int8"), "s": np.array(0.1, np.float32), "z": np.array(zero_point, np.int8)}
    (row,) = audit_onnx(save(tmp_path / "m.onnx", nodes, tensors, {"x": [2, 16]}, opset=opset))
    assert (row.axis, row.shape, row.dtype, row.eligible) == (0, (16, 32), "int8", eligible)
    assert row.pattern == ("2:4" if eligible else "")
    assert eligible or "asymmetric" in row.reason


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_scales_per_channel_and_a_transpose_behind_them(tmp_path: Path, opset: int) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0),
        helper.make_node("Transpose", ["d"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    scales = np.linspace(0.1, 1, 32, dtype=np.float32)
    tensors = {"w": two_of_four((32, 16), 1, "int8"), "s": scales, "z": np.zeros(32, np.int8)}
    (row,) = audit_onnx(save(tmp_path / "m.onnx", nodes, tensors, {"x": [2, 16]}, opset=opset))
    assert (row.axis, row.shape, row.pattern, row.reason) == (0, (16, 32), "2:4", "")


@pytest.mark.parametrize("opset", [10, 13, 18, 21])
def test_a_float_weight_that_the_graph_quantises(tmp_path: Path, opset: int) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    tensors = {"w": two_of_four((16, 32), 0), "s": np.array(0.1, np.float32), "z": np.array(0, np.int8)}
    (row,) = audit_onnx(save(tmp_path / "m.onnx", nodes, tensors, {"x": [2, 16]}, opset=opset))
    assert (row.axis, row.pattern, row.dtype) == (0, "2:4", "float32")


def test_no_axis_is_told_where_the_shape_is_unknown(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["w", "s"], ["v"]), helper.make_node("MatMul", ["x", "v"], ["y"])]
    tensors = {"w": two_of_four((16, 32), 0), "s": np.array(2, np.float32)}
    (row,) = audit_onnx(save(tmp_path / "m.onnx", nodes, tensors, {"x": [2, 16]}))
    assert (row.axis, row.shape, row.reason) == (
        None,
        (),
        "it is computed in the graph by Mul, which sparse kernels do not see through",
    )


@pytest.mark.parametrize(("groups", "pattern"), [(1, "2:4"), (2, "2:4"), (4, "")])
def test_no_four_reaches_over_groups_of_a_transposed_convolution(tmp_path: Path, groups: int, pattern: str) -> None:
    weight = np.zeros((8, 8, 3, 3), np.float32)
    weight[[0, 1, 4, 5]] = 1  # both inputs of every second group of two
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=groups)
    (row,) = audit_onnx(save(tmp_path / "m.onnx", [node], {"w": weight}, {"x": [1, 8, 4, 4]}))
    assert (row.axis, row.pattern) == (0, pattern)


@pytest.mark.parametrize(("groups", "pattern"), [(1, "2:4-transposable"), (2, "2:4-transposable"), (4, "2:4")])
def test_no_four_reaches_over_groups_of_outputs(tmp_path: Path, groups: int, pattern: str) -> None:
    weight = np.zeros((8, 4, 1, 1), np.float32)
    weight[[0, 1, 4, 5], :2] = 1
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=groups)
    (row,) = audit_onnx(save(tmp_path / "m.onnx", [node], {"w": weight}, {"x": [1, 4 * groups, 4, 4]}))
    assert (row.axis, row.pattern) == (1, pattern)
