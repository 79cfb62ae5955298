"""Files above the limit of one file: the data beside the graph is what was checked, or everything is as before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from onnx import helper
from onnx_graphs import save, two_of_four
from onnx_models import make_sparse
from torch import nn

import sparsefx
from sparsefx.errors import ExportError
from sparsefx.passes import onnx_write
from sparsefx.passes.onnx_read import load_data, read_onnx
from sparsefx.passes.onnx_write import write_checked


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> ir.Model:
    monkeypatch.setattr(onnx_write, "LARGEST_SINGLE_FILE", 1000)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return ir.load(save(tmp_path_factory.mktemp("source") / "f.onnx", [node], {"w": two_of_four((64, 32), 0)}, {"x": [2, 64]}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("damage", ["cut short", "other bytes", "a link"])
def test_damaged_data_is_replaced_by_the_next_export(model: ir.Model, tmp_path: Path, damage: str) -> None:
    write_checked(model, tmp_path / "m.onnx", read_onnx)
    sound = contents(tmp_path)
    (data,) = tmp_path.glob("*.data")
    wrong = sound[data.name][:100] if damage == "cut short" else bytes(len(sound[data.name]))
    if damage == "a link":
        (tmp_path / "elsewhere").write_bytes(wrong)
        data.unlink()
        data.symlink_to("elsewhere")
    else:
        data.write_bytes(wrong)
    write_checked(model, tmp_path / "m.onnx", read_onnx)
    assert (tmp_path / "elsewhere").exists() is (damage == "a link")
    assert {name: content for name, content in contents(tmp_path).items() if name != "elsewhere"} == sound
    assert [weight.pattern for weight in sparsefx.audit_onnx(tmp_path / "m.onnx")] == ["2:4"]


def test_sound_data_stays_the_file_that_it_is(model: ir.Model, tmp_path: Path) -> None:
    write_checked(model, tmp_path / "m.onnx", read_onnx)
    (data,) = tmp_path.glob("*.data")
    before = data.stat().st_ino
    write_checked(model, tmp_path / "m.onnx", read_onnx)
    assert data.stat().st_ino == before


def test_damaged_data_comes_back_where_the_graph_cannot_be_placed(
    model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checked(model, tmp_path / "m.onnx", read_onnx)
    (data,) = tmp_path.glob("*.data")
    data.write_bytes(b"damaged")
    before = contents(tmp_path)
    replace = os.replace

    def fail_for_the_graph(source: Path, target: Path) -> None:
        if Path(target).name == "m.onnx":
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(onnx_write.os, "replace", fail_for_the_graph)
    with pytest.raises(ExportError, match="Input/output error"):
        write_checked(model, tmp_path / "m.onnx", read_onnx)
    assert contents(tmp_path) == before


def test_a_directory_in_the_place_of_the_data_is_left_alone(model: ir.Model, tmp_path: Path) -> None:
    write_checked(model, tmp_path / "m.onnx", read_onnx)
    (data,) = tmp_path.glob("*.data")
    data.unlink()
    data.mkdir()
    (data / "file").write_bytes(b"kept")
    with pytest.raises(ExportError, match="could not be written"):
        write_checked(model, tmp_path / "m.onnx", read_onnx)
    assert (data / "file").read_bytes() == b"kept"


def test_metadata_stays_with_tensors_beside_the_graph(model: ir.Model, tmp_path: Path) -> None:
    tensor = ir.Tensor(two_of_four((64, 32), 0), name="w", doc_string="text", metadata_props={"key": "value"})
    model.graph.initializers["w"].const_value = tensor
    write_checked(model, tmp_path / "m.onnx", read_onnx)
    assert model.graph.initializers["w"].const_value is tensor
    read, _ = read_onnx(tmp_path / "m.onnx")
    for _ in range(2):
        found = read.graph.initializers["w"].const_value
        assert found is not None
        assert (dict(found.metadata_props), found.doc_string) == ({"key": "value"}, "text")
        assert found.numpy().tobytes() == tensor.numpy().tobytes()
        load_data(read)
        assert not isinstance(read.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_compact_padded_and_int8_files_keep_their_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(40, 128), nn.ReLU(), nn.Linear(128, 32))
    make_sparse(network[0])
    make_sparse(network[2])
    x = torch.randn(2, 40)
    monkeypatch.setattr(onnx_write, "LARGEST_SINGLE_FILE", 1000)
    sparsefx.export_onnx(network, x, tmp_path / "p.onnx", pad_channels=True)
    sparsefx.compact_onnx(tmp_path / "p.onnx", tmp_path / "c.onnx")
    sparsefx.densify_onnx(tmp_path / "c.onnx", tmp_path / "d.onnx")
    sparsefx.quantize_onnx(tmp_path / "p.onnx", [x], tmp_path / "q.onnx")
    for name in ("p", "c", "d", "q"):
        rows = sparsefx.audit_onnx(tmp_path / f"{name}.onnx")
        assert [row.source for row in rows] == ["0.weight", "2.weight"]
        assert "its 40 inputs were padded with zeros" in rows[0].note
