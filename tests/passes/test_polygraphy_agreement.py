"""The audit against `polygraphy inspect sparsity`, an independent check; where they differ, raw numbers decide for the audit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_models import randomise_norms, sparsify_by_hand
from torch import Tensor, nn

from sparsefx.onnx_audit import audit_onnx
from sparsefx.passes.lower_onnx import lower_onnx
from sparsefx.sparse_parameter import remove_records

sparse = pytest.importorskip("polygraphy.tools.sparse", reason="polygraphy is not installed")


def told_by_polygraphy(path: Path) -> set[str]:
    pruner = sparse.SparsityPruner(onnx.load(path))
    with np.errstate(over="ignore"):
        pruner.check()
    return set(pruner.sparse_tensors)


def told_by_the_audit(path: Path) -> set[str]:
    return {weight.name for weight in audit_onnx(path) if weight.pattern.startswith("2:4")}


class Mixed(nn.Module):
    """Convolutions, linear layers on two and on three axes, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3))
        self.attention = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.features(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens)[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_agree_on_convolutions_and_matrix_products(tmp_path: Path, dtype: torch.dtype) -> None:
    model = randomise_norms(Mixed()).eval()
    names = sparsify_by_hand(model)
    with torch.no_grad():
        model.attention.linear2.weight.normal_()  # so that a linear layer that is not 2:4 is among them
    path = tmp_path / "m.onnx"
    for module in model.modules():
        remove_records(module)
    lower_onnx(model.to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype), path, samples=1)
    found = told_by_the_audit(path)
    assert found == told_by_polygraphy(path)
    assert found == set(names) - {"attention.linear2.weight"}


def one_op(path: Path, op: str, values: np.ndarray, element: int = TensorProto.FLOAT) -> Path:
    tensor = helper.make_tensor("w", element, values.shape, values.astype(np.float32).flatten())
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", element, None)],
        [helper.make_tensor_value_info("y", element, None)],
        [tensor],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def alternating(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Ones whose zeros alternate along ``axis``: 1, 0, 0, 1, and none along any other."""
    keep = np.resize([1, 0, 0, 1], shape[axis])
    return np.broadcast_to(keep.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape)


@pytest.mark.parametrize(
    ("op", "shape", "axis", "element"),
    [
        ("ConvTranspose", (16, 8, 2, 2), 0, TensorProto.FLOAT),
        ("MatMul", (4, 16, 8), 1, TensorProto.FLOAT),
        ("MatMul", (16, 3), 0, TensorProto.BFLOAT16),
    ],
)
def test_the_known_gaps_of_polygraphy(tmp_path: Path, op: str, shape: tuple[int, ...], axis: int, element: int) -> None:
    values = alternating(shape, axis)
    groups = np.moveaxis(values, axis, -1).reshape(-1, 4)
    assert (groups != 0).sum(1).max() == 2
    path = one_op(tmp_path / "m.onnx", op, values, element)
    assert told_by_the_audit(path) == {"w"}
    assert told_by_polygraphy(path) == set()


def test_a_pattern_along_the_wrong_axis_of_three_is_not_taken_for_one(tmp_path: Path) -> None:
    path = one_op(tmp_path / "m.onnx", "MatMul", alternating((4, 16, 8), 0))
    assert told_by_polygraphy(path) == {"w"}
    assert told_by_the_audit(path) == set()
