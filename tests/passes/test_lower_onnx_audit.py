"""Audit of ONNX files of any origin: axes per op, patterns, reasons, and files that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import save, two_of_four
from onnx_models import make_sparse
from torch import nn

from sparsefx.errors import ExportError
from sparsefx.onnx_audit import OnnxWeight, audit_onnx
from sparsefx.passes.lower_onnx import lower_onnx
from sparsefx.passes.onnx_weights import holds


def audit_one(path: Path) -> OnnxWeight:
    (weight,) = audit_onnx(path)
    return weight


@pytest.mark.parametrize(
    ("op", "operands", "attributes", "shape", "axis"),
    [
        ("Conv", ["x", "w"], {}, (32, 16, 3, 3), 1),
        ("Conv", ["x", "w"], {"group": 2}, (32, 16, 3, 3), 1),
        ("Conv", ["x", "w"], {}, (32, 16, 3), 1),
        ("Gemm", ["x", "w"], {"transB": 1}, (32, 16), 1),
        ("Gemm", ["x", "w"], {}, (16, 32), 0),
        ("Gemm", ["w", "x"], {}, (32, 16), 1),
        ("Gemm", ["w", "x"], {"transA": 1}, (16, 32), 0),
        ("MatMul", ["x", "w"], {}, (16, 32), 0),
        ("MatMul", ["x", "w"], {}, (3, 16, 32), 1),
        ("MatMul", ["w", "x"], {}, (32, 16), 1),
    ],
)
def test_reduction_axis_of_each_op(
    tmp_path: Path, op: str, operands: list[str], attributes: dict[str, Any], shape: tuple[int, ...], axis: int
) -> None:
    node = helper.make_node(op, operands, ["y"], name="n", **attributes)
    right = audit_one(save(tmp_path / "right.onnx", [node], {"w": two_of_four(shape, axis)}, {"x": [None] * 2}))
    assert (right.axis, right.pattern, right.density) == (axis, "2:4", 0.5)
    assert right.reason == ("is a convolution with 2 groups; sparse kernels take one group" if attributes.get("group") else "")
    other = {0: 1, 1: 0, 2: 1}[axis] if len(shape) != 3 or op == "Conv" else 2
    wrong = audit_one(save(tmp_path / "wrong.onnx", [node], {"w": two_of_four(shape, other)}, {"x": [None] * 2}))
    assert (wrong.pattern, wrong.eligible) == ("", False)
    assert f"not 2:4 along axis {axis}" in wrong.reason


def test_conv_transpose_and_recurrent_weights_have_an_axis_but_no_kernel(tmp_path: Path) -> None:
    up = helper.make_node("ConvTranspose", ["x", "w"], ["y"])
    weight = audit_one(save(tmp_path / "up.onnx", [up], {"w": two_of_four((16, 32, 2, 2), 0)}, {"x": [1, 16, 4, 4]}))
    assert (weight.axis, weight.pattern, weight.reason) == (0, "2:4", "no sparse kernel for ConvTranspose is documented")
    lstm = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=8)
    tensors = {"w": two_of_four((1, 32, 16), 2), "r": two_of_four((1, 32, 8), 2)}
    rows = audit_onnx(save(tmp_path / "lstm.onnx", [lstm], tensors, {"x": [5, 1, 16]}))
    assert [(row.name, row.axis, row.pattern) for row in rows] == [("w", 2, "2:4"), ("r", 2, "2:4")]


def test_activations_are_not_weights(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "z"], ["y"])
    assert audit_onnx(save(tmp_path / "m.onnx", [node], {}, {"x": [2, 16], "z": [16, 4]})) == ()


def test_weights_behind_transparent_ops_are_followed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("Split", ["t", "sizes"], ["a", "b"], axis=1),
        helper.make_node("MatMul", ["x", "a"], ["p"]),
        helper.make_node("MatMul", ["x", "b"], ["q"]),
        helper.make_node("Add", ["p", "q"], ["y"]),
    ]
    tensors = {"w": two_of_four((64, 16), 1), "sizes": np.array([32, 32])}
    rows = audit_onnx(save(tmp_path / "m.onnx", nodes, tensors, {"x": [2, 16]}))
    assert [(row.name, row.axis, row.shape, row.pattern, row.eligible) for row in rows] == [("w", 0, (16, 32), "2:4", True)] * 2


def test_weights_computed_by_other_ops_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["w", "s"], ["v"]), helper.make_node("MatMul", ["x", "v"], ["y"])]
    tensors = {"w": two_of_four((16, 32), 0), "s": np.float32(2)}
    row = audit_one(save(tmp_path / "m.onnx", nodes, {k: np.asarray(v) for k, v in tensors.items()}, {"x": [2, 16]}))
    assert row.reason == "it is computed in the graph by Mul, which sparse kernels do not see through"


@pytest.mark.parametrize("linear", [True, False])
def test_sparse_tensors_are_measured_and_refused(tmp_path: Path, linear: bool) -> None:
    values = two_of_four((16, 32), 0)
    indices = np.flatnonzero(values) if linear else np.argwhere(values)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(values[values != 0], "w"), numpy_helper.from_array(indices.astype(np.int64), "i"), [16, 32]
    )
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    constant = helper.make_node("Constant", [], ["w"], sparse_value=sparse)
    for path in (
        save(tmp_path / "initializer.onnx", [node], {}, {"x": [2, 16]}, sparse_initializer=[sparse]),
        save(tmp_path / "constant.onnx", [constant, node], {}, {"x": [2, 16]}),
    ):
        row = audit_one(path)
        assert (row.pattern, row.density, row.eligible) == ("2:4", 0.5, False)
        assert "stored as a sparse tensor, which TensorRT rejects" in row.reason


def test_fused_and_integer_ops_are_listed_with_a_reason(tmp_path: Path) -> None:
    values = two_of_four((16, 32), 0)
    fused = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft")
    row = audit_one(save(tmp_path / "fused.onnx", [fused], {"w": values}, {"x": [2, 16]}))
    assert (row.axis, row.reason) == (None, "FusedMatMul is not known to sum over an axis of this weight")
    integer = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    row = audit_one(save(tmp_path / "integer.onnx", [integer], {"w": values.astype(np.int8)}, {"x": [2, 16]}))
    assert (row.axis, row.pattern, row.eligible) == (0, "2:4", False)


def test_constant_nodes_are_refused(tmp_path: Path) -> None:
    values = two_of_four((16, 32), 0)
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(values))
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    row = audit_one(save(tmp_path / "c.onnx", [constant, node], {}, {"x": [2, 16]}))
    assert (row.pattern, row.reason) == ("2:4", "it is a Constant node; sparse kernels take plain initializers only")


@pytest.mark.parametrize(("zero_point", "eligible"), [(0, True), (3, False)])
def test_quantised_weights_need_a_zero_point_of_zero(tmp_path: Path, zero_point: int, eligible: bool) -> None:
    values = two_of_four((16, 32), 0).astype(np.int8)
    nodes = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"]), helper.make_node("MatMul", ["x", "d"], ["y"])]
    tensors = {"w": values, "s": np.array(0.1, np.float32), "z": np.array(zero_point, np.int8)}
    row = audit_one(save(tmp_path / "m.onnx", nodes, tensors, {"x": [2, 16]}))
    assert row.eligible is eligible
    assert eligible or "asymmetric" in row.reason


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((16, 6), "6 values along axis 1 are not a multiple of 4"),
        ((16, 24), "24 inputs is not a multiple of 16"),
        ((12, 16), "12 outputs is not a multiple of 8"),
    ],
)
def test_sizes_that_no_kernel_takes(tmp_path: Path, shape: tuple[int, int], reason: str) -> None:
    values = two_of_four(shape, 1) if shape[1] % 4 == 0 else np.ones(shape, np.float32)
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    assert audit_one(save(tmp_path / "m.onnx", [node], {"w": values}, {"x": [2, shape[1]]})).reason == reason


def test_weights_in_subgraphs_are_seen(tmp_path: Path) -> None:
    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("MatMul", ["x", name], [f"{name}_y"])
        output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [output], [numpy_helper.from_array(two_of_four((16, 32), 0), name)])

    choose = helper.make_node("If", ["c"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    rows = audit_onnx(save(tmp_path / "m.onnx", [choose], {"c": np.array(True)}, {"x": [2, 16]}))
    assert {row.name for row in rows} == {"a", "b"}
    assert all(row.eligible for row in rows)


def test_a_file_of_our_own_names_its_sources(tmp_path: Path) -> None:
    model = nn.Sequential(make_sparse(nn.Linear(256, 256)), nn.ReLU(), nn.Linear(256, 8))
    lower_onnx(model, torch.randn(2, 3, 256), tmp_path / "m.onnx")
    first, second = audit_onnx(tmp_path / "m.onnx")
    assert (first.source, first.pattern, first.eligible) == ("0.weight", "2:4", True)
    assert first.note == "build with FP16, BF16 or INT8 allowed: float32 has no sparse kernel"
    assert (second.source, second.pattern, second.eligible) == ("2.weight", "", False)


def test_transposable_pattern_is_recognised(tmp_path: Path) -> None:
    values = np.tile(np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]], np.float32), (4, 4))
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    assert audit_one(save(tmp_path / "m.onnx", [node], {"w": values}, {"x": [2, 16]})).pattern == "2:4-transposable"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2), st.integers(0, 2**31))
def test_holds_equals_counting_group_by_group(groups: int, keep: int, axis: int, seed: int) -> None:
    shape = [2, 3, 2]
    shape[axis] = 4 * groups
    array = np.random.default_rng(seed).integers(0, 2, size=shape)
    lines = np.moveaxis(array, axis, -1).reshape(-1, 4 * groups)
    expected = all((line[start : start + 4] != 0).sum() <= keep for line in lines for start in range(0, 4 * groups, 4))
    assert holds(array, axis, keep, 4) is expected


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    whole = save(tmp_path / "m.onnx", [node], {"w": two_of_four((16, 32), 0)}, {"x": [2, 16]}).read_bytes()
    for name, content in {
        "half": whole[: len(whole) // 2],
        "text": b"this is no ONNX file\n" * 9,
        "empty": b"",
        "zip": b"PK\x03\x04" + bytes(99),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ExportError, match="not an ONNX file") as caught:
            audit_onnx(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    with pytest.raises(ExportError, match="no such file"):
        audit_onnx(tmp_path / "missing.onnx")
    with pytest.raises(ExportError, match="this is a directory"):
        audit_onnx(tmp_path)


@pytest.mark.parametrize(("damage", "text"), [("missing", "is missing; put it beside"), ("short", "is cut short")])
def test_external_data_that_is_missing_or_short(tmp_path: Path, damage: str, text: str) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = save(tmp_path / "m.onnx", [node], {"w": two_of_four((16, 32), 0)}, {"x": [2, 16]})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert audit_one(path).eligible
    data = tmp_path / "m.data"
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ExportError, match=text):
        audit_onnx(path)


def test_a_deep_graph_is_read_in_one_walk(tmp_path: Path) -> None:
    depth = 3000
    nodes = [helper.make_node("MatMul", ["x0", "w"], ["x1"])]
    nodes += [helper.make_node("Relu", [f"x{index}"], [f"x{index + 1}"]) for index in range(1, depth)]
    nodes += [helper.make_node("MatMul", [f"x{depth}", "w"], ["y"])]
    file = save(tmp_path / "deep.onnx", nodes, {"w": two_of_four((16, 16), 0)}, {"x0": [2, 16]})
    assert [(weight.name, weight.pattern) for weight in audit_onnx(file)] == [("w", "2:4"), ("w", "2:4")]


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_external_data_of_subgraphs_and_constants(tmp_path: Path, damage: str) -> None:
    def branch(name: str) -> onnx.GraphProto:
        node = helper.make_node("MatMul", ["x", name], [f"{name}_y"])
        output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [output], [numpy_helper.from_array(two_of_four((16, 32), 0), name)])

    choose = helper.make_node("If", ["c"], ["z"], then_branch=branch("a"), else_branch=branch("b"))
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(two_of_four((32, 16), 0)))
    nodes = [choose, constant, helper.make_node("MatMul", ["z", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"c": np.array(True)}, {"x": [2, 16]})
    options = {"save_as_external_data": True, "location": "m.data", "size_threshold": 0, "convert_attribute": True}
    onnx.save(onnx.load(path), path, **options)
    assert [weight.pattern for weight in audit_onnx(path)] == ["2:4", "2:4", "2:4"]
    data = tmp_path / "m.data"
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-64])
    with pytest.raises(ExportError, match="is missing; put it beside" if damage == "missing" else "is cut short"):
        audit_onnx(path)
