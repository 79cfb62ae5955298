"""Files whose constants lie beside them, and names as long as a system allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_graphs import save, two_of_four

import sparsefx
from sparsefx.passes.quantize_onnx import quantize_onnx

ROWS = np.random.default_rng(3).normal(size=(8, 64)).astype(np.float32)


def rewrite_compact(file: Path, out: Path) -> None:
    sparsefx.compact_onnx(file, out)


def rewrite_int8(file: Path, out: Path) -> None:
    quantize_onnx(file, [ROWS], out)


@pytest.mark.parametrize("rewrite", [rewrite_compact, rewrite_int8])
@pytest.mark.parametrize("place", ["same", "other"])
def test_a_constant_node_whose_values_lie_beside_the_file(
    tmp_path: Path, rewrite: Callable[[Path, Path], None], place: str
) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(ROWS, "c"))
    nodes = [constant, helper.make_node("Add", ["x", "c"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    file = save(tmp_path / "f.onnx", nodes, {"w": two_of_four((64, 64), 0)}, {"x": [8, 64]})
    model = onnx.load(file)
    onnx.save(model, file, save_as_external_data=True, location="f.bin", convert_attribute=True, size_threshold=16)
    folder = tmp_path / place if place == "other" else tmp_path
    folder.mkdir(exist_ok=True)
    rewrite(file, folder / "out.onnx")
    (tmp_path / "moved").mkdir()
    alone = (folder / "out.onnx").rename(tmp_path / "moved" / "out.onnx")
    exact, found = (onnxruntime.InferenceSession(str(path)).run(None, {"x": ROWS})[0] for path in (file, alone))
    assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)


def test_a_name_as_long_as_the_system_allows(tmp_path: Path) -> None:
    model, x = torch.nn.Linear(16, 16), torch.randn(2, 16)
    file = tmp_path / f"{'a' * 250}.onnx"
    sparsefx.export_onnx(model, x, file)
    quantize_onnx(file, [x], file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
