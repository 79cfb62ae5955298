"""INT8 of graphs whose names or constants onnxruntime's quantiser would get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx_graphs import save

from sparsefx.errors import ExportError, OptionError
from sparsefx.passes.quantize_onnx import quantize_onnx

ROWS = np.random.default_rng(3).normal(size=(8, 64)).astype(np.float32)
WEIGHT = np.random.default_rng(4).normal(size=(64, 64)).astype(np.float32)
OTHER = np.linspace(-1, 1, 64, dtype=np.float32)


def matmul(name: str, *inputs: str, output: str, op: str = "MatMul", **attributes: Any) -> Any:
    return helper.make_node(op, list(inputs), [output], name=name, **attributes)


def relative_error(file: Path, quantised: Path, feed: dict[str, np.ndarray]) -> float:
    """Root mean square of what INT8 changed in the first output, relative to that output."""
    exact, found = (onnxruntime.InferenceSession(str(path)).run(None, feed)[0] for path in (file, quantised))
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def test_two_nodes_of_one_name(tmp_path: Path) -> None:
    nodes = [matmul("n", "x", "w", output="h"), matmul("n", "h", "v", output="y")]
    file = save(tmp_path / "f.onnx", nodes, {"w": WEIGHT, "v": WEIGHT.copy()}, {"x": [None, 64]})
    report = quantize_onnx(file, [ROWS], tmp_path / "q.onnx", exclude=["v"])
    assert [weight.name for weight in report.weights] == ["w"]
    names = [node.name for node in onnx.load(tmp_path / "q.onnx").graph.node]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["w_scale", "w_quantized", "w_zero_point", "x_scale", "w_DequantizeLinear_Output"])
@pytest.mark.parametrize("kind", ["constant", "weight", "input", "value"])
def test_names_that_the_quantiser_gives(tmp_path: Path, name: str, kind: str) -> None:
    nodes = [matmul("w_DequantizeLinear" if kind == "value" else "first", "x", "w", output="h")]
    tensors = {"w": WEIGHT}
    inputs: dict[str, list[Any]] = {"x": [None, 64]}
    feed = {"x": ROWS}
    if kind == "constant":
        tensors[name] = OTHER
    elif kind == "weight":
        tensors[name] = WEIGHT.copy()
    elif kind == "input":
        inputs[name] = [64]
        feed[name] = OTHER
    else:
        nodes.insert(0, matmul("doubled", "x", "x", output=name, op="Add"))
    nodes.append(matmul("last", "h", name, output="y", op="MatMul" if kind == "weight" else "Add"))
    file = save(tmp_path / "f.onnx", nodes, tensors, inputs)
    report = quantize_onnx(file, [feed], tmp_path / "q.onnx")
    assert [weight.name for weight in report.weights] == (["w", name] if kind == "weight" else ["w"])
    assert report.relative_errors["y"] < 0.05
    assert relative_error(file, tmp_path / "q.onnx", feed) < 0.05
    graph = onnx.load(tmp_path / "q.onnx").graph
    assert [value.name for value in graph.input] == list(feed)
    assert not any("hidden" in text for node in graph.node for text in (node.name, *node.input, *node.output))


def test_a_file_of_which_a_part_is_in_int8_already(tmp_path: Path) -> None:
    nodes = [matmul("a", "x", "w", output="h"), matmul("b", "x", "v", output="k"), matmul("c", "h", "k", output="y", op="Add")]
    file = save(tmp_path / "f.onnx", nodes, {"w": WEIGHT, "v": -2 * WEIGHT[::-1]}, {"x": [None, 64]})
    quantize_onnx(file, [ROWS], tmp_path / "half.onnx", exclude=["v"])
    report = quantize_onnx(tmp_path / "half.onnx", [ROWS], tmp_path / "q.onnx")
    assert [weight.name for weight in report.weights] == ["v"]
    assert relative_error(file, tmp_path / "q.onnx", {"x": ROWS}) < 0.05


@pytest.mark.parametrize("shared", [False, True])
def test_a_bias_keeps_its_factor(tmp_path: Path, shared: bool) -> None:
    nodes = [matmul("a", "x", "w", "b", output="h", op="Gemm", beta=30.0, alpha=0.5)]
    nodes.append(matmul("c", "h", "b" if shared else "h", output="y", op="Add"))
    file = save(tmp_path / "f.onnx", nodes, {"w": WEIGHT, "b": 10 * OTHER}, {"x": [None, 64]})
    report = quantize_onnx(file, [ROWS], tmp_path / "q.onnx")
    assert report.relative_errors["y"] < 0.05
    assert relative_error(file, tmp_path / "q.onnx", {"x": ROWS}) < 0.05


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([ROWS[:0]], "empty batches only"),
        ([ROWS, np.full((2, 64), np.nan, np.float32)], "calibration batch 1 holds NaN or infinity in 'x'"),
    ],
)
def test_batches_from_which_no_range_follows(tmp_path: Path, batches: list[np.ndarray], text: str) -> None:
    file = save(tmp_path / "f.onnx", [matmul("a", "x", "w", output="y")], {"w": WEIGHT}, {"x": [None, 64]})
    with pytest.raises(OptionError, match=text):
        quantize_onnx(file, batches, tmp_path / "q.onnx")


def test_a_weight_that_is_not_finite_is_told(tmp_path: Path) -> None:
    file = save(tmp_path / "f.onnx", [matmul("a", "x", "w", output="y")], {"w": WEIGHT * np.nan}, {"x": [None, 64]})
    with pytest.raises(ExportError, match="w: it holds NaN or infinity"):
        quantize_onnx(file, [ROWS], tmp_path / "q.onnx")
