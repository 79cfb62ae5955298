"""INT8 from files that other tools wrote: older opsets, stacks of matrices, weights that several ops share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_graphs import save, two_of_four

import sparsefx
from sparsefx.onnx_audit import audit_onnx
from sparsefx.passes.quantize_onnx import quantize_onnx


def samples(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
def test_every_opset_with_scales_per_channel(tmp_path: Path, opset: int) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["h"], transB=1), helper.make_node("MatMul", ["h", "v"], ["y"])]
    tensors = {"w": two_of_four((32, 64), 1), "v": two_of_four((32, 16), 0)}
    file = save(tmp_path / "f.onnx", nodes, tensors, {"x": [None, 64]}, opset=opset)
    report = quantize_onnx(file, [samples(8, 64)], tmp_path / "q.onnx")
    assert [(weight.name, weight.pattern) for weight in report.weights] == [("w", "2:4"), ("v", "2:4")]
    assert report.relative_errors["y"] < 0.05
    assert onnx.load(tmp_path / "q.onnx").opset_import[0].version == opset
    rows = audit_onnx(tmp_path / "q.onnx")
    assert [(row.axis, row.pattern, row.dtype, row.reason) for row in rows] == [(1, "2:4", "int8", ""), (0, "2:4", "int8", "")]


def test_the_oldest_opset_of_an_export(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    sparsefx.sparsify(model, pattern="2:4", example_inputs=x)
    sparsefx.export_onnx(model, x, tmp_path / "f.onnx", opset=18)
    report = quantize_onnx(tmp_path / "f.onnx", [x], tmp_path / "q.onnx")
    assert [weight.pattern for weight in report.weights] == ["2:4", "2:4"]


@pytest.mark.parametrize("stack", [1, 4])
def test_stacks_of_matrices_stay_in_float(tmp_path: Path, stack: int) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    tensors = {"w": two_of_four((stack, 64, 32), 1), "v": two_of_four((32, 16), 0)}
    file = save(tmp_path / "f.onnx", nodes, tensors, {"x": [None, stack, 8, 64]})
    report = quantize_onnx(file, [samples(2, stack, 8, 64)], tmp_path / "q.onnx")
    assert [weight.name for weight in report.weights] == ["v"]
    assert [(name, reason.partition(" of shape")[0]) for name, reason in report.left] == [("w", "it is a stack of matrices")]
    assert report.relative_errors["y"] < 0.05
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert np.array_equal(kept["w"], tensors["w"])


def test_a_weight_read_along_both_axes_stays_in_float(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], transB=1),
        helper.make_node("Gemm", ["a", "w"], ["b"]),
        helper.make_node("Gemm", ["b", "v"], ["c"], transB=1),
        helper.make_node("Gemm", ["c", "v"], ["y"], transB=1),
    ]
    file = save(tmp_path / "f.onnx", nodes, {"w": two_of_four((64, 64), 1), "v": two_of_four((64, 64), 1)}, {"x": [None, 64]})
    report = quantize_onnx(file, [samples(8, 64)], tmp_path / "q.onnx")
    assert [(weight.name, weight.pattern) for weight in report.weights] == [("v", "2:4")]
    assert [name for name, _ in report.left] == ["w"]
    assert "several ops sum over different axes of it" in report.left[0][1]
    assert report.relative_errors["y"] < 0.05


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_batches_of_unequal_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: Any) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    file = save(tmp_path / "f.onnx", nodes, {"w": two_of_four((64, 32), 0), "v": two_of_four((32, 16), 0)}, {"x": [None, 64]})
    data = samples(400, 64)
    ranges = []
    for name, batches in (("equal", np.split(data, 50)), ("unequal", [data[390:], *np.split(data[:390], 39 * 5)])):
        report = quantize_onnx(file, batches, tmp_path / f"{name}.onnx", method=method)
        assert report.relative_errors["y"] < 0.05
        tensors = {tensor.name: tensor for tensor in onnx.load(tmp_path / f"{name}.onnx").graph.initializer}
        ranges.append({scale: float(numpy_helper.to_array(tensors[scale])) for scale in ("x_scale", "h_scale")})
    assert ranges[1] == pytest.approx(ranges[0], rel=0 if method == "minmax" else 0.02)
    assert capsys.readouterr().out == ""
