"""Every way in which an exported op can hold a weight, and 2:4 along the axis that it sums over, counted in the file itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_models import make_sparse, randomise_norms
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import ExportError
from sparsefx.passes import lower_onnx as lowering
from sparsefx.passes.lower_onnx import lower_onnx


class InOut(nn.Module):
    """A weight ``[in, out]``, as transformers' Conv1D holds it: a Gemm whose second operand is not transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Stack(nn.Module):
    """Three matrices in one parameter, read as ``[n, in, out]`` or transposed."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(torch.randn(3, 16, 32) if transposed else torch.randn(3, 32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight.transpose(1, 2) if self.transposed else self.weight)


class Normed(nn.Module):
    """A convolution and the BatchNorm that is folded into it."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.weighty, self.norm = convolution, nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.weighty(x))
        return found


def weight_of(path: Path, name: str) -> np.ndarray:
    return next(onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name == name)


def groups_are_two_of_four(array: np.ndarray, axis: int) -> bool:
    lines = np.moveaxis(array, axis, -1).reshape(-1, 4)
    return bool((np.count_nonzero(lines, axis=1) == 2).all())


CASES: list[tuple[str, Callable[[], nn.Module], int, tuple[int, ...], str, int, dict[str, int]]] = [
    ("Gemm [in, out]", InOut, 0, (4, 32), "Gemm", 0, {"transB": 0}),
    ("Gemm [out, in]", lambda: nn.Linear(32, 16), 1, (4, 32), "Gemm", 1, {"transB": 1}),
    ("MatMul of three axes", lambda: nn.Linear(32, 16), 1, (2, 4, 32), "MatMul", 0, {}),
    ("stack [n, in, out]", lambda: Stack(False), 1, (3, 5, 32), "MatMul", 1, {}),
    ("stack [n, out, in]", lambda: Stack(True), 2, (3, 5, 32), "MatMul", 1, {}),
    ("Conv", lambda: nn.Conv2d(32, 16, 3), 1, (1, 32, 6, 6), "Conv", 1, {}),
    ("Conv of one axis", lambda: nn.Conv1d(32, 16, 3), 1, (1, 32, 6), "Conv", 1, {}),
    ("Conv of three axes", lambda: nn.Conv3d(32, 16, 2), 1, (1, 32, 4, 4, 4), "Conv", 1, {}),
    ("ConvTranspose", lambda: nn.ConvTranspose2d(32, 16, 3), 0, (1, 32, 4, 4), "ConvTranspose", 0, {}),
]


@pytest.mark.parametrize(
    ("make", "axis", "shape", "op", "file_axis", "attributes"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_of_four_lies_along_the_axis_that_is_summed(
    tmp_path: Path,
    make: Callable[[], nn.Module],
    axis: int,
    shape: tuple[int, ...],
    op: str,
    file_axis: int,
    attributes: dict[str, int],
    dtype: torch.dtype,
) -> None:
    model = make_sparse(make(), axis=axis).eval().to(dtype)
    report = lower_onnx(model, torch.randn(shape).to(dtype), tmp_path / "m.onnx")
    (row,) = report.initializers
    assert (row.name, row.op, row.axis, row.pattern, row.density) == ("weight", op, file_axis, "2:4", 0.5)
    array = weight_of(tmp_path / "m.onnx", "weight")
    assert groups_are_two_of_four(array.astype(np.float32), file_axis)
    (node,) = (node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == op)
    found = {entry.name: entry.i for entry in node.attribute}
    assert {name: found.get(name, 0) for name in attributes} == attributes


@pytest.mark.parametrize("transposed", [False, True])
def test_a_folded_batch_norm_keeps_two_of_four(tmp_path: Path, transposed: bool) -> None:
    convolution = nn.ConvTranspose2d(32, 16, 3) if transposed else nn.Conv2d(32, 16, 3)
    model = randomise_norms(Normed(make_sparse(convolution, axis=0 if transposed else 1)).eval())
    lower_onnx(model, torch.randn(2, 32, 6, 6), tmp_path / "m.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node] == ["ConvTranspose" if transposed else "Conv"]
    array = weight_of(tmp_path / "m.onnx", "weighty.weight")
    assert groups_are_two_of_four(array, 0 if transposed else 1)
    assert not np.array_equal(array, convolution.weight.detach().numpy())


@pytest.mark.parametrize(
    ("make", "axis", "shape", "op", "file_axis", "attributes"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_a_weight_that_is_reordered_along_that_axis_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], nn.Module],
    axis: int,
    shape: tuple[int, ...],
    op: str,
    file_axis: int,
    attributes: dict[str, int],
) -> None:
    """As a pass that permutes inputs would: values and zeros are all there, in other groups."""
    import onnx_ir as ir

    translate = lowering._translate

    def reordered(*arguments: object) -> object:
        model, sources = translate(*arguments)  # type: ignore[arg-type]
        value = model.graph.initializers["weight"]
        assert value.const_value is not None
        array = value.const_value.numpy()
        order = np.arange(array.shape[file_axis]).reshape(4, -1).T.ravel()
        value.const_value = ir.Tensor(np.ascontiguousarray(np.take(array, order, file_axis)), name="weight")
        return model, sources

    monkeypatch.setattr(lowering, "_translate", reordered)
    with pytest.raises(ExportError, match=rf"weight: 2:4 in the model, but not in the file along axis {file_axis} of {op}"):
        lower_onnx(make_sparse(make(), axis=axis), torch.randn(shape), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_external_data_is_the_same_bytes_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file above the limit: twice the same bytes, its weights equal to those of one file, quantised and compact as such."""
    from sparsefx.passes import onnx_write

    torch.manual_seed(0)
    model = sparsefx.finalize(
        sparsefx.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), algorithm="static")
    )
    x = torch.randn(2, 64)
    lower_onnx(model, x, tmp_path / "one.onnx")
    monkeypatch.setattr(onnx_write, "LARGEST_SINGLE_FILE", 1000)
    contents = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        lower_onnx(model, x, folder / "m.onnx")
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 2
    wanted = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "one.onnx").graph.initializer}
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "a" / "m.onnx").graph.initializer}
    assert wanted.keys() == found.keys()
    assert all(np.array_equal(wanted[name], found[name]) for name in wanted)
    assert [weight.pattern for weight in sparsefx.audit_onnx(tmp_path / "a" / "m.onnx")] == ["2:4", "2:4"]
    report = sparsefx.quantize_onnx(tmp_path / "a" / "m.onnx", [x], tmp_path / "b" / "q.onnx")
    assert [weight.pattern for weight in report.weights] == ["2:4", "2:4"]
    assert [weight.dtype for weight in sparsefx.audit_onnx(tmp_path / "b" / "q.onnx")] == ["int8", "int8"]
    assert len(sparsefx.compact_onnx(tmp_path / "a" / "m.onnx", tmp_path / "b" / "c.onnx").weights) == 2
    assert sorted(path.suffix for path in (tmp_path / "b").iterdir()) == [".data", ".data", ".data", ".onnx", ".onnx", ".onnx"]
