"""Parts of a model that torch.export refuses: the largest that it takes, each checked, nothing left unsaid."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import CaptureError, ExportError


class Head(nn.Module):
    """Branches on data, around a layer that does not, beside a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(16, 4)
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.score(x) * self.weight
        return x[x > 0] if x.sum().item() > 0 else x[x < 0]


class Detector(nn.Module):
    """A backbone that exports, and a head that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True))
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.backbone(x))
        return found


def test_the_largest_parts_are_exported(tmp_path: Path) -> None:
    model = sparsefx.sparsify(Detector())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = sparsefx.export_parts(model, torch.randn(2, 16), tmp_path / "new" / "parts")
    assert list(report.parts) == ["backbone", "head.score"]
    assert set(report.refused) == {"", "head"}
    assert all("torch.export refuses" in reason for reason in report.refused.values())
    assert report.uncovered == ()
    assert sorted(path.name for path in (tmp_path / "new" / "parts").iterdir()) == ["backbone.onnx", "head.score.onnx"]
    assert report.parts["backbone"].initializers[0].pattern == "2:4"
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    session = onnxruntime.InferenceSession(report.parts["backbone"].path)
    x = torch.randn(2, 16)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model.backbone(x), rtol=1e-5, atol=1e-6)
    told = str(report)
    assert "backbone: " in told
    assert "the whole model is not exported as one" in told


def test_what_exports_as_a_whole_is_one_part(tmp_path: Path) -> None:
    report = sparsefx.export_parts(nn.Sequential(nn.Linear(16, 4)), torch.randn(2, 16), tmp_path)
    assert list(report.parts) == [""]
    assert (tmp_path / "Sequential.onnx").exists()


class Late(nn.Module):
    """A layer that the run never reaches, and one whose input ONNX does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) if x.sum().item() > -1e9 else self.unused(x)


def test_weights_in_no_file_are_listed(tmp_path: Path) -> None:
    report = sparsefx.export_parts(Late(), torch.randn(2, 16), tmp_path)
    assert list(report.parts) == ["used"]
    assert report.uncovered == ("unused.weight",)
    assert "in no file: unused.weight" in str(report)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="does not run on the example inputs"):
        sparsefx.export_parts(Detector(), torch.randn(2, 3), tmp_path)
    with pytest.raises(ExportError, match="it has no layer"):
        sparsefx.export_parts(nn.ReLU(), torch.randn(2, 3), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be made"):
        sparsefx.export_parts(Detector(), torch.randn(2, 16), tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""
