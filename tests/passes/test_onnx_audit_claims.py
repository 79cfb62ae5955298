"""What the audit claims of weights in branches, of whole numbers with a zero point, and of what is no weight at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import save, two_of_four

import sparsefx
from sparsefx.atomic_file import check_place
from sparsefx.errors import ExportError, OptionError
from sparsefx.onnx_audit import OnnxWeight, audit_onnx

WHOLE = (two_of_four((64, 32), 0) != 0).astype(np.int8)


def branch(name: str, nodes: list[Any], tensors: dict[str, np.ndarray]) -> onnx.GraphProto:
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return helper.make_graph(nodes, name, [], [output], [numpy_helper.from_array(array, key) for key, array in tensors.items()])


def test_a_weight_in_a_branch_is_told_as_it_is_stored(tmp_path: Path) -> None:
    def quantised(name: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("DequantizeLinear", ["w", "s"], [f"{name}_w"]),
            helper.make_node("MatMul", ["x", f"{name}_w"], [f"{name}_y"]),
        ]
        return branch(name, nodes, {"w": WHOLE, "s": np.array(0.5, np.float32)})

    nodes = [
        helper.make_node("If", ["c"], ["h"], then_branch=quantised("a"), else_branch=quantised("b")),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    tensors = {"c": np.array(True), "v": two_of_four((32, 16), 0)}
    rows = audit_onnx(save(tmp_path / "m.onnx", nodes, tensors, {"x": [2, 64]}))
    assert [(row.name, row.dtype, row.encoding) for row in rows] == [
        ("w", "int8", "plain"),
        ("w", "int8", "plain"),
        ("v", "float32", "plain"),
    ]
    assert [row.bytes["plain"] for row in rows] == [64 * 32, 64 * 32, 4 * 32 * 16]


def test_what_a_branch_makes_of_an_input_is_no_weight(tmp_path: Path) -> None:
    def copied(name: str) -> onnx.GraphProto:
        return branch(name, [helper.make_node("Identity", ["x"], [f"{name}_x"])], {})

    def made(name: str) -> onnx.GraphProto:
        return branch(name, [helper.make_node("Identity", ["w"], [f"{name}_w"])], {})

    nodes = [
        helper.make_node("If", ["c"], ["h"], then_branch=copied("a"), else_branch=copied("b")),
        helper.make_node("If", ["c"], ["v"], then_branch=made("d"), else_branch=made("e")),
        helper.make_node("RandomNormalLike", ["w"], ["noise"]),
        helper.make_node("MatMul", ["x", "noise"], ["n"]),
        helper.make_node("MatMul", ["n", "h"], ["k"]),
        helper.make_node("MatMul", ["k", "v"], ["y"]),
    ]
    tensors = {"c": np.array(True), "w": two_of_four((64, 64), 0)}
    (row,) = audit_onnx(save(tmp_path / "m.onnx", nodes, tensors, {"x": [64, 64]}))
    assert row.reason == "it is computed in the graph by If, which sparse kernels do not see through"


@pytest.mark.parametrize("point", [0, 3])
@pytest.mark.parametrize("op", ["MatMulInteger", "QLinearMatMul", "ConvInteger", "QLinearConv"])
def test_zeros_of_whole_numbers_are_those_of_the_zero_point(tmp_path: Path, op: str, point: int) -> None:
    convolves = "Conv" in op
    weight = np.ascontiguousarray(WHOLE.T[:, :, None, None]) if convolves else WHOLE
    outputs = weight.shape[0 if convolves else 1]
    tensors = {"w": weight, "s": np.ones((), np.float32), "z": np.zeros((), np.int8), "p": np.full(outputs, point, np.int8)}
    tensors["t"] = np.ones(outputs, np.float32)
    inputs = ["x", "w", "z", "p"] if "Integer" in op else ["x", "s", "z", "w", "t", "p", "s", "z"]
    shape = [1, 64, 4, 4] if convolves else [8, 64]
    row = audit_one(save(tmp_path / "m.onnx", [helper.make_node(op, inputs, ["y"])], tensors, {"x": shape}))
    assert (row.pattern, row.dtype) == ("2:4" if point == 0 else "", "int8")
    assert (row.density < 0.6) == (point == 0)
    assert (row.bytes["compact"] is not None) == (point == 0)
    assert ("asymmetric" in row.reason) == (point != 0)


def audit_one(file: Path) -> OnnxWeight:
    (row,) = audit_onnx(file)
    return row


def test_four_bits_take_half_a_byte_and_have_no_sparse_kernel(tmp_path: Path) -> None:
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), helper.make_node("MatMul", ["x", "d"], ["y"])]
    file = save(tmp_path / "m.onnx", nodes, {"s": np.ones((), np.float32)}, {"x": [8, 64]}, opset=21)
    model = onnx.load(file)
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.INT4, [64, 32], WHOLE.flatten().tolist()))
    onnx.save(model, file)
    row = audit_one(file)
    assert (row.pattern, row.dtype, row.eligible) == ("2:4", "int4", False)
    assert (row.bytes["plain"], row.bytes["compact"]) == (64 * 32 // 2, None)


@pytest.mark.parametrize("shape", [(0, 32), (64, 0)])
def test_a_weight_without_values_has_no_pattern(tmp_path: Path, shape: tuple[int, int]) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    row = audit_one(save(tmp_path / "m.onnx", [node], {"w": np.zeros(shape, np.float32)}, {"x": [8, shape[0]]}))
    assert (row.pattern, row.reason) == ("", "it holds no value")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ExportError, match="this is no ordinary file"):
        sparsefx.export_onnx(torch.nn.Linear(16, 16), torch.randn(2, 16), pipe)
    with pytest.raises(OptionError, match="this is no ordinary file"):
        check_place(pipe)
    assert pipe.is_fifo()
