"""Options of the export beyond the plain float32 file: bfloat16, a free batch, and files that are wrong in other ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper
from onnx_ir.passes import PassError
from onnx_models import make_sparse, randomise_norms, sparsify_by_hand
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import ExportError, OptionError
from sparsefx.onnx_audit import audit_onnx
from sparsefx.passes import lower_onnx as lowering
from sparsefx.passes.lower_onnx import lower_onnx
from sparsefx.passes.onnx_bfloat16 import write_float32_twin


class Mixed(nn.Module):
    """Convolution with BatchNorm, attention and a linear layer on three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)))


def test_bfloat16_is_exported_and_compared_in_float32(tmp_path: Path) -> None:
    model = randomise_norms(Mixed()).eval()
    names = sparsify_by_hand(model)
    before = {name: tensor.clone() for name, tensor in model.bfloat16().state_dict().items()}
    report = lower_onnx(model, torch.randn(2, 16, 6, 6).bfloat16(), tmp_path / "m.onnx")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert (report.opset, report.tolerance) == (22, 2e-2)
    assert 0 < report.largest_relative_error < 2e-2
    assert "compared in float32, since onnxruntime has no bfloat16 kernels on the CPU" in report.checks
    rows = audit_onnx(tmp_path / "m.onnx")
    assert {row.source for row in rows if row.pattern == "2:4"} == set(names)
    assert {row.dtype for row in rows} == {"bfloat16"}
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_linear_layer_into_which_a_norm_is_folded_in_bfloat16(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16)).eval()
    with torch.no_grad():
        for tensor in (model[1].running_var, model[1].weight, model[1].bias, model[1].running_mean):
            tensor.uniform_(0.5, 2)
    names = sparsify_by_hand(model)
    report = lower_onnx(model.bfloat16(), torch.randn(4, 64).bfloat16(), tmp_path / "m.onnx")
    assert 0 < report.largest_relative_error < 2e-2
    rows = audit_onnx(tmp_path / "m.onnx")
    assert [(row.source, row.pattern, row.dtype) for row in rows] == [(name, "2:4", "bfloat16") for name in names]
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}


def test_a_wrong_bfloat16_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translate = lowering._translate

    def damaged(*arguments: Any) -> Any:
        model, sources = translate(*arguments)
        value = next(value for name, value in model.graph.initializers.items() if name == "weight")
        assert value.const_value is not None
        array = value.const_value.numpy().astype(np.float32) * 1.1
        value.const_value = ir.Tensor(array.astype(ml_dtypes.bfloat16), dtype=ir.DataType.BFLOAT16, name="weight")
        return model, sources

    monkeypatch.setattr(lowering, "_translate", damaged)
    with pytest.raises(ExportError, match="the file is off by"):
        lower_onnx(nn.Linear(32, 8).bfloat16(), torch.randn(2, 32).bfloat16(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_compact_weights(tmp_path: Path) -> None:
    model = make_sparse(nn.Linear(128, 128)).bfloat16()
    x = torch.randn(2, 128).bfloat16()
    plain = lower_onnx(model, x, tmp_path / "p.onnx")
    small = lower_onnx(model, x, tmp_path / "c.onnx", weights="compact")
    assert plain.bytes - small.bytes > 128 * 128 * 2 * 7 / 16 - 2000
    sparsefx.densify_onnx(tmp_path / "c.onnx")
    assert (tmp_path / "c.onnx").read_bytes() == (tmp_path / "p.onnx").read_bytes()


def test_the_twin_has_no_bfloat16_left(tmp_path: Path) -> None:
    lower_onnx(nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8)).bfloat16(), torch.randn(2, 3, 32).bfloat16(), tmp_path / "m.onnx")
    write_float32_twin(tmp_path / "m.onnx", tmp_path / "t.onnx")
    assert "BFLOAT16" not in str(ir.load(tmp_path / "t.onnx"))
    assert "BFLOAT16" in str(ir.load(tmp_path / "m.onnx"))


def test_a_free_batch_from_an_example_of_one(tmp_path: Path) -> None:
    report = sparsefx.export_onnx(Mixed(), torch.randn(1, 16, 6, 6), tmp_path / "m.onnx", dynamic_batch=True)
    assert any("another dynamic size (float32[3, 16, 6, 6])" in check for check in report.checks)
    shape = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in shape] == ["batch", 16, 6, 6]
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        assert session.run(None, {"x": np.zeros((batch, 16, 6, 6), np.float32)})[0].shape[0] == batch


def test_a_free_batch_of_several_and_nested_inputs(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], scale: Tensor | None = None) -> Tensor:
            return (x + pair[0] * pair[1]) * (1 if scale is None else scale)

    x = torch.randn(3, 4)
    sparsefx.export_onnx(Net(), ((x, (x, x)), {"scale": torch.tensor(2.0)}), tmp_path / "m.onnx", dynamic_batch=True)
    shapes = [
        [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in onnx.load(tmp_path / "m.onnx").graph.input
    ]
    assert shapes == [["batch", 4], ["batch", 4], ["batch", 4], []]


@pytest.mark.parametrize(
    ("inputs", "options", "text"),
    [
        ((torch.randn(2, 4), torch.randn(3, 4)), {}, "first axes of sizes 2, 3"),
        (torch.tensor(1.0), {}, "no tensor with an axis"),
        (torch.randn(2, 4), {"dynamic_shapes": ({0: "n"},)}, "were both given"),
    ],
)
def test_a_free_batch_that_cannot_be(tmp_path: Path, inputs: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        sparsefx.export_onnx(nn.Linear(4, 4), inputs, tmp_path / "m.onnx", dynamic_batch=True, **options)


def test_spatial_sizes_can_be_free_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, stride=2))
    names = {0: "batch", 2: "height", 3: "width"}
    report = sparsefx.export_onnx(model, torch.randn(2, 16, 6, 8), tmp_path / "m.onnx", dynamic_shapes=(names,))
    assert any("float32[3, 16, 7, 9]" in check for check in report.checks)


@pytest.mark.parametrize("version", [0, 999])
def test_an_operator_set_that_nobody_knows(tmp_path: Path, version: int) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", 1, [1])],
        [helper.make_tensor_value_info("y", 1, [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)]), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=rf"version {version} of the ONNX operator set, and versions 1 to \d+ are known"):
        audit_onnx(tmp_path / "m.onnx")


def test_a_file_without_weights_is_no_error(tmp_path: Path) -> None:
    sparsefx.export_onnx(nn.ReLU(), torch.randn(2, 3), tmp_path / "m.onnx")
    assert audit_onnx(tmp_path / "m.onnx") == ()


class WideAttention(nn.Module):
    """Attention over five axes, or three, which the exporter alone refuses."""

    def __init__(self, causal: bool, masked: bool, windows: tuple[int, ...]) -> None:
        super().__init__()
        self.projection = nn.Linear(16, 48)
        self.causal, self.windows = causal, windows
        self.mask = torch.rand(6, 6) > 0.3 if masked else None

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.projection(x).unflatten(1, (*self.windows, 6)).chunk(3, -1)
        mask = None if self.mask is None else self.mask | torch.eye(6, dtype=torch.bool)
        found: Tensor = nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=self.causal)
        return found


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("windows", [(), (2, 2)])
def test_attention_over_any_number_of_axes(tmp_path: Path, causal: bool, masked: bool, windows: tuple[int, ...]) -> None:
    model = WideAttention(causal, masked, windows)
    report = lower_onnx(model, torch.randn(2, 24 if windows else 6, 16), tmp_path / "model.onnx")
    assert report.largest_relative_error < 1e-5
    assert report.outputs[0].largest_value > 0.1


class Joined(nn.Module):
    """Two inputs go through one layer together and are parted again, as optical flow networks do with two images."""

    def __init__(self, split: bool, axis: int) -> None:
        super().__init__()
        self.layer, self.split, self.axis = nn.Linear(16, 16), split, axis

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        both = self.layer(torch.cat([first, second]))
        left, right = both.split(first.shape[0], self.axis) if self.split else both.chunk(2, self.axis)
        low, high = right.chunk(2, -1)
        return torch.cat([left * high.repeat(1, 2), left - low.repeat(1, 2)], 1)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("axis", [0, -2])
def test_a_free_batch_is_parted_in_equal_parts(tmp_path: Path, split: bool, axis: int) -> None:
    model = Joined(split, axis).eval()
    lower_onnx(model, (torch.randn(2, 16), torch.randn(2, 16)), tmp_path / "model.onnx", dynamic_batch=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (1, 2, 5):
        first, second = torch.randn(batch, 16), torch.randn(batch, 16)
        (found,) = session.run(None, {"first": first.numpy(), "second": second.numpy()})
        np.testing.assert_allclose(found, model(first, second).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_the_reason_of_the_exporter_is_told_and_not_the_pass_it_was_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        try:
            try:
                raise RuntimeError("no folding of node_split")
            except RuntimeError as reason:
                raise PassError("at step 0") from reason
        except PassError as error:
            raise PassError("when running a pass") from error

    monkeypatch.setattr(torch.onnx.ONNXProgram, "optimize", fails)
    with pytest.raises(ExportError, match="has no ONNX form: no folding of node_split; replace"):
        lower_onnx(nn.Linear(16, 16), torch.randn(2, 16), tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


def test_a_size_that_the_model_fixes_is_told_and_the_inputs_are_as_before(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 4, 4).sum(1)

    x = torch.randn(2, 16)
    before = dict(x.__dict__)
    with pytest.raises(ExportError, match=r"the model's own code fixes that size, as x\.view\(2, \.\.\.\) does"):
        lower_onnx(Fixed(), x, tmp_path / "m.onnx", dynamic_batch=True)
    assert x.__dict__ == before
    assert lower_onnx(Fixed(), x, tmp_path / "m.onnx").samples == 3


class Branches(nn.Module):
    """Linear layers on three axes in the branches of a condition, one of them read outside as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(self.first(x).sum() > 0, lambda x: self.first(x).neg(), lambda x: self.second(x).relu(), (x,))


@pytest.mark.parametrize("weights", ["plain", "compact"])
def test_linear_layers_in_branches(tmp_path: Path, weights: Any) -> None:
    model = Branches().eval()
    names = sparsify_by_hand(model)
    report = lower_onnx(model, torch.randn(2, 3, 64), tmp_path / "m.onnx", weights=weights, samples=6)
    assert report.largest_relative_error < 1e-4
    rows = audit_onnx(tmp_path / "m.onnx")
    assert {(row.source, row.op, row.axis, row.pattern) for row in rows} == {(name, "MatMul", 0, "2:4") for name in names}
    assert len(rows) == 3
