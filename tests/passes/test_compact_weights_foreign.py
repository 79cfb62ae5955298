"""Compact weights beside what other tools do to a graph: names that are taken, joined constants, 8-bit floats."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import save, two_of_four
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateInitializersPass

from sparsefx.onnx_audit import audit_onnx
from sparsefx.onnx_files import compact_onnx, densify_onnx

X = np.random.default_rng(5).normal(size=(3, 64)).astype(np.float32)


def run(path: Path) -> bytes:
    (found,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": X})
    return bytes(found.tobytes())


def tensors(path: Path) -> dict[str, bytes]:
    return {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in onnx.load(path).graph.initializer}


def with_output_shape(path: Path) -> Path:
    model = onnx.load(path)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 64]))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        *("w.values", "w.codes", "w.0", "w.4", "w.6"),
        *("sparsefx.compact.mask", "sparsefx.compact.shifts", "sparsefx.compact.zero.FLOAT", "sparsefx.compact.shape.64x64"),
    ],
)
@pytest.mark.parametrize("kind", ["initializer", "output"])
def test_names_that_are_taken(tmp_path: Path, name: str, kind: str) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["h" if kind == "initializer" else name], transB=1)]
    constants = {"w": two_of_four((64, 64), 1)}
    if kind == "initializer":
        constants[name] = np.array(7, np.float32)
        nodes.append(helper.make_node("Add", ["h", name], ["y"]))
    else:
        nodes.append(helper.make_node("Relu", [name], ["y"]))
    plain = with_output_shape(save(tmp_path / "f.onnx", nodes, constants, {"x": [None, 64]}))
    assert compact_onnx(plain, tmp_path / "c.onnx").weights == ("w",)
    assert run(tmp_path / "c.onnx") == run(plain)
    assert densify_onnx(tmp_path / "c.onnx", tmp_path / "d.onnx").weights == ("w",)
    assert tensors(tmp_path / "d.onnx") == tensors(plain)


def two_weights(folder: Path, second: np.ndarray) -> Path:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["h"], transB=1), helper.make_node("Gemm", ["h", "v"], ["y"], transB=1)]
    return with_output_shape(save(folder / "f.onnx", nodes, {"w": two_of_four((64, 64), 1), "v": second}, {"x": [None, 64]}))


def test_a_file_of_which_a_part_is_compact_already(tmp_path: Path) -> None:
    dense = np.ones((64, 64), np.float32)
    two_weights(tmp_path, dense)
    compact_onnx(tmp_path / "f.onnx", tmp_path / "c.onnx")
    model = onnx.load(tmp_path / "c.onnx")
    (other,) = (tensor for tensor in model.graph.initializer if tensor.name == "v")
    sparse = two_of_four((64, 64), 1) * 2
    other.CopyFrom(numpy_helper.from_array(sparse, "v"))
    onnx.save(model, tmp_path / "c.onnx")
    assert compact_onnx(tmp_path / "c.onnx", tmp_path / "both.onnx").weights == ("v",)
    shared = [tensor.name for tensor in onnx.load(tmp_path / "both.onnx").graph.initializer if "sparsefx" in tensor.name]
    assert len(shared) == len(set(shared)) == 6
    plain = two_weights(tmp_path, sparse)
    assert run(tmp_path / "both.onnx") == run(plain)
    densify_onnx(tmp_path / "both.onnx")
    assert tensors(tmp_path / "both.onnx") == tensors(plain)


@pytest.mark.parametrize("joined", ["initializers", "expressions", "initializers and expressions"])
@pytest.mark.parametrize("equal", [True, False])
def test_weights_whose_parts_an_optimizer_joined(tmp_path: Path, joined: str, equal: bool) -> None:
    plain = two_weights(tmp_path, two_of_four((64, 64), 1) * (1 if equal else 2))
    compact_onnx(plain, tmp_path / "c.onnx")
    model = ir.load(tmp_path / "c.onnx")
    if "initializers" in joined:
        DeduplicateInitializersPass(size_limit=10**9)(model)
    if "expressions" in joined:
        CommonSubexpressionEliminationPass()(model)
    ir.save(model, tmp_path / "joined.onnx")
    densify_onnx(tmp_path / "joined.onnx")
    assert [(row.pattern, row.encoding) for row in audit_onnx(tmp_path / "joined.onnx")] == [("2:4", "plain")] * 2
    assert run(tmp_path / "joined.onnx") == run(plain)
    if not equal or joined != "initializers and expressions":
        assert tensors(tmp_path / "joined.onnx") == tensors(plain)


def test_weights_in_8_bit_floats_stay_and_others_become_compact(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["f", "s"], ["d"]),
        helper.make_node("Gemm", ["x", "d"], ["h"], transB=1),
        helper.make_node("Gemm", ["h", "w"], ["y"], transB=1),
    ]
    constants = {"s": np.array(0.1, np.float32), "w": two_of_four((64, 64), 1)}
    file = with_output_shape(save(tmp_path / "f.onnx", nodes, constants, {"x": [None, 64]}, opset=21))
    model = onnx.load(file)
    small = two_of_four((64, 64), 1).astype(ml_dtypes.float8_e4m3fn)
    model.graph.initializer.append(helper.make_tensor("f", TensorProto.FLOAT8E4M3FN, small.shape, small.tobytes(), raw=True))
    onnx.save(model, file)
    assert compact_onnx(file, tmp_path / "c.onnx").weights == ("w",)
    assert [(row.name, row.pattern, row.encoding) for row in audit_onnx(tmp_path / "c.onnx")] == [
        ("f", "2:4", "plain"),
        ("w", "2:4", "compact"),
    ]
