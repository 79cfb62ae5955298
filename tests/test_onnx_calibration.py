"""Calibration data from numpy files, and ``sparsefx quantize``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import sparsefx
from sparsefx.cli import app
from sparsefx.errors import OptionError
from sparsefx.onnx_audit import audit_onnx
from sparsefx.onnx_calibration import read_calibration


class Pair(nn.Module):
    """Two inputs, one of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(10, 16), nn.Linear(16, 8)

    def forward(self, image: Tensor, index: Tensor) -> Tensor:
        return self.layer(image + self.table(index))


@pytest.fixture
def one(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = sparsefx.sparsify(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), algorithm="static")
    sparsefx.export_onnx(model, torch.randn(2, 16), tmp_path / "one.onnx", dynamic_batch=True)
    return tmp_path / "one.onnx"


@pytest.fixture
def fixed(tmp_path: Path) -> Path:
    sparsefx.export_onnx(nn.Linear(16, 4), torch.randn(8, 16), tmp_path / "fixed.onnx")
    return tmp_path / "fixed.onnx"


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    sparsefx.export_onnx(Pair(), (torch.randn(2, 16), torch.tensor([1, 2])), tmp_path / "pair.onnx", dynamic_batch=True)
    return tmp_path / "pair.onnx"


def data(samples: int = 70) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(samples, 16)).astype(np.float32)


def test_one_file_is_cut_into_batches(one: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", data())
    found = read_calibration(tmp_path / "d.npy", one)
    assert [batch["input"].shape for batch in found] == [(32, 16), (32, 16), (6, 16)]
    np.testing.assert_array_equal(np.concatenate([batch["input"] for batch in found]), data())
    assert len(read_calibration(tmp_path / "d.npy", one, batch=7)) == 10


def test_a_batch_of_the_files_own_leaves_the_rest_out(fixed: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", input=data(), label=np.zeros(70))
    assert [batch["input"].shape for batch in read_calibration(tmp_path / "d.npz", fixed)] == [(8, 16)] * 8
    np.save(tmp_path / "few.npy", data(7))
    with pytest.raises(OptionError, match=r"few\.npy holds 7 samples, and the batch of .*fixed\.onnx is 8; give more"):
        read_calibration(tmp_path / "few.npy", fixed)


def test_a_folder_is_read_in_the_order_of_names(pair: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in (2, 1):
        np.savez(folder / f"{number}.npz", image=data(number).astype(np.float64), index=np.full(number, number, np.int32))
    (folder / "notes.txt").write_text("not data")
    found = read_calibration(folder, pair)
    assert [batch["index"].tolist() for batch in found] == [[1], [2, 2]]
    assert {batch["image"].dtype.name for batch in found} == {"float32"}
    assert {batch["index"].dtype.name for batch in found} == {"int64"}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("missing.npy", None, "there is no .*missing.npy; expected an .npz or .npy file"),
        ("d.csv", b"1,2", "expected an .npz or .npy file, or a folder of them"),
        ("d.npy", b"no array at all", "cannot be read as numpy arrays: .*; write it with numpy.save"),
        ("d.npz", b"PK\x03\x04 cut short", "cannot be read as numpy arrays"),
        ("d.npz", b"", "cannot be read as numpy arrays"),
        ("d.npy", np.zeros((4, 17), np.float32), r"has shape \(4, 17\); expected samples of the model's input, \?x16"),
        ("d.npy", np.float32(1), r"has shape \(\); expected samples"),
        ("d.npy", np.zeros((4, 16), np.uint8), "is uint8, and the model takes float32; prepare the data"),
        ("d.npy", np.zeros((0, 16), np.float32), "holds 0 samples"),
        ("d.npy", np.array([{"a": 1}], dtype=object), "cannot be read as numpy arrays"),
    ],
)
def test_data_that_cannot_be_used(one: Path, tmp_path: Path, name: str, content: object, told: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=told):
        read_calibration(path, one)


def test_arrays_that_do_not_go_together(pair: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=data(3))
    with pytest.raises(OptionError, match=r"has no array 'index' \(it holds image\); the inputs of the model are image, index"):
        read_calibration(tmp_path / "a.npz", pair)
    np.savez(tmp_path / "b.npz", image=data(3), index=np.zeros(2, np.int64))
    with pytest.raises(OptionError, match="hold different numbers of samples"):
        read_calibration(tmp_path / "b.npz", pair)
    np.save(tmp_path / "c.npy", data(3))
    with pytest.raises(OptionError, match=r"an \.npy file is for one input, and the model has image, index"):
        read_calibration(tmp_path / "c.npy", pair)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="or a folder of them"):
        read_calibration(tmp_path / "empty", pair)


def test_quantize_on_the_command_line(one: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", data())
    arguments = ["quantize", str(one), "--calibration", str(tmp_path / "d.npy"), "--out", str(tmp_path / "q.onnx")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "2 weights in INT8, 2 of them 2:4 as before" in result.output
    assert "relative error" in result.output
    assert {row.dtype for row in audit_onnx(tmp_path / "q.onnx")} == {"int8"}
    sparsefx.quantize_onnx(one, torch.from_numpy(data()).split(32), tmp_path / "python.onnx")
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "python.onnx").read_bytes()
    result = CliRunner().invoke(app, [*arguments, "--exclude", "0.*", "--method", "percentile", "--batch", "10"])
    assert result.exit_code == 0, result.output
    assert "0.weight stays: it is excluded" in result.output


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--method", "guess"], "error: method='guess' was given; expected one of 'minmax', 'entropy', 'percentile'"),
        (["--exclude", "nothing"], "no weight has such a name"),
        (["--calibration", "nowhere.npy"], "there is no nowhere.npy"),
    ],
)
def test_refusals_are_one_line(one: Path, tmp_path: Path, more: list[str], told: str) -> None:
    np.save(tmp_path / "d.npy", data())
    (tmp_path / "q.onnx").write_bytes(b"an earlier file")
    arguments = ["quantize", str(one), "--calibration", str(tmp_path / "d.npy"), "--out", str(tmp_path / "q.onnx"), *more]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "q.onnx").read_bytes() == b"an earlier file"
