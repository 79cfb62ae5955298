"""INT8 files: symmetric, zeros and 2:4 kept, compared with the float file, and nothing written where something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from onnx_models import sparsify_by_hand
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import ExportError, OptionError
from sparsefx.onnx_audit import audit_onnx
from sparsefx.passes import quantize_onnx as quantising
from sparsefx.passes.lower_onnx import lower_onnx
from sparsefx.passes.quantize_onnx import quantize_onnx


class Net(nn.Module):
    """A convolution, a transposed one, and linear layers on two and on three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.tokens = nn.Linear(16, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.conv(x))))
        return self.head(torch.relu(self.tokens(x.flatten(2).transpose(1, 2))).mean(1))


@pytest.fixture
def model() -> Net:
    net = Net().eval()
    sparsify_by_hand(net)
    return net


@pytest.fixture
def plain(model: Net, tmp_path: Path) -> Path:
    lower_onnx(model, torch.randn(2, 16, 4, 4), tmp_path / "f.onnx", dynamic_batch=True, samples=1)
    return tmp_path / "f.onnx"


def batches() -> list[Tensor]:
    return list(torch.randn(24, 16, 4, 4, generator=torch.Generator().manual_seed(3)).split(8))


def test_zeros_stay_and_outputs_are_close(plain: Path, tmp_path: Path) -> None:
    content = plain.read_bytes()
    report = quantize_onnx(plain, batches(), tmp_path / "q.onnx")
    assert plain.read_bytes() == content
    assert [(w.name, w.pattern, w.density) for w in report.weights] == [
        ("conv.weight", "2:4", 0.5),
        ("up.weight", "", 1.0),
        ("tokens.weight", "2:4", 0.5),
        ("head.weight", "2:4", 0.5),
    ]
    assert (report.batches, report.left, report.bytes) == (3, (), (tmp_path / "q.onnx").stat().st_size)
    assert report.relative_errors["output"] < 0.05
    assert report.agreement["output"] > 0.9
    assert "3 of them 2:4 as before" in str(report)
    onnx.checker.check_model(str(tmp_path / "q.onnx"), full_check=True)
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(plain).graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    for weight in report.weights:
        stored = after[f"{weight.name}_quantized"]
        assert stored.dtype == np.int8
        assert not (stored[before[weight.name] == 0] != 0).any()
    zero_points = [array for name, array in after.items() if name.endswith("zero_point")]
    assert zero_points
    assert not any(array.any() for array in zero_points)


def test_the_audit_of_an_int8_file(plain: Path, tmp_path: Path) -> None:
    quantize_onnx(plain, batches(), tmp_path / "q.onnx")
    rows = {row.source: row for row in audit_onnx(tmp_path / "q.onnx")}
    before = {row.source: row for row in audit_onnx(plain)}
    assert rows.keys() == before.keys()
    for name, row in rows.items():
        assert (row.axis, row.pattern, row.eligible, row.dtype) == (
            before[name].axis,
            before[name].pattern,
            before[name].eligible,
            "int8",
        )
    assert "an INT8 product runs sparse only where its result is quantised again" in rows["conv.weight"].note


def test_the_same_data_gives_the_same_bytes(plain: Path, tmp_path: Path) -> None:
    quantize_onnx(plain, batches(), tmp_path / "a.onnx")
    quantize_onnx(plain, [{"x": batch.numpy()} for batch in batches()], tmp_path / "b.onnx")
    quantize_onnx(plain, [(batch, torch.zeros(8)) for batch in batches()], tmp_path / "c.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "a.onnx").read_bytes()


def test_compact_files_are_restored_first(model: Net, plain: Path, tmp_path: Path) -> None:
    sparsefx.compact_onnx(plain, tmp_path / "c.onnx")
    quantize_onnx(plain, batches(), tmp_path / "a.onnx")
    quantize_onnx(tmp_path / "c.onnx", batches(), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_an_int8_file_becomes_compact_and_back(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)).eval()
    sparsify_by_hand(wide)
    lower_onnx(wide, torch.randn(2, 128), tmp_path / "w.onnx", dynamic_batch=True)
    quantize_onnx(tmp_path / "w.onnx", [torch.randn(8, 128)], tmp_path / "q.onnx")
    content = (tmp_path / "q.onnx").read_bytes()
    report = sparsefx.compact_onnx(tmp_path / "q.onnx")
    assert report.weights == ("0.weight_quantized",)
    assert sparsefx.densify_onnx(tmp_path / "q.onnx").bytes == len(content)
    assert (tmp_path / "q.onnx").read_bytes() == content


def test_excluded_weights_stay_in_float(plain: Path, tmp_path: Path) -> None:
    report = quantize_onnx(plain, batches(), tmp_path / "q.onnx", exclude=["conv.*", "head.weight"])
    assert report.left == (("conv.weight", "it is excluded"), ("head.weight", "it is excluded"))
    stored = {t.name: t.data_type for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert stored["conv.weight"] == onnx.TensorProto.FLOAT
    assert stored["tokens.weight_quantized"] == onnx.TensorProto.INT8


@pytest.mark.parametrize(
    ("calibration", "options", "text"),
    [
        ([], {}, "held no batch"),
        (torch.randn(2, 16, 4, 4), {}, "is one tensor; expected an iterable of batches"),
        ({"x": 1}, {}, "is a dict; expected an iterable of batches"),
        ([{"image": 1}], {}, "has no 'x'; the file's inputs are x"),
        ([()], {}, "has 0 values; the file's inputs are x"),
        ([torch.randn(2, 16, 4, 4)], {"method": "guess"}, "method='guess' was given"),
        ([torch.randn(2, 16, 4, 4)], {"exclude": ["nothing*"]}, "no weight has such a name"),
    ],
)
def test_wrong_options(plain: Path, tmp_path: Path, calibration: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        quantize_onnx(plain, calibration, tmp_path / "q.onnx", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["f.onnx"]


def test_data_of_another_shape_and_half_precision(model: Net, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot quantise the file.*have the shapes of the file's inputs"):
        quantize_onnx(plain, [torch.randn(2, 3, 4, 4)], tmp_path / "q.onnx")
    lower_onnx(model.half(), torch.randn(2, 16, 4, 4).half(), tmp_path / "h.onnx", samples=1)
    with pytest.raises(ExportError, match="it is float16; export the model in float32"):
        quantize_onnx(tmp_path / "h.onnx", batches(), tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_a_quantiser_that_loses_zeros_is_found_out(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = quantising._quantize

    def damaged(source: Path, quantized: Path, *rest: Any) -> None:
        right(source, quantized, *rest)
        model = ir.load(quantized)
        value = model.graph.initializers["tokens.weight_quantized"]
        assert value.const_value is not None
        value.const_value = ir.Tensor(np.maximum(value.const_value.numpy(), 1), name=value.name)
        ir.save(model, quantized)

    monkeypatch.setattr(quantising, "_quantize", damaged)
    with pytest.raises(ExportError, match=r"tokens.weight: \d+ zeros became something else"):
        quantize_onnx(plain, batches(), tmp_path / "q.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["f.onnx"]
