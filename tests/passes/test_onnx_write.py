"""Files above the limit of one file: the data beside the graph is what was checked, or everything is as before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import onnx_ir as ir
import pytest
from onnx import helper
from onnx_graphs import save, two_of_four

import sparsefx
from sparsefx.errors import ExportError
from sparsefx.passes import onnx_write
from sparsefx.passes.onnx_read import read_onnx
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
