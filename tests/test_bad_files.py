"""Bad files and places that cannot be written, for every command that reads or writes: an error of one line, nothing changed."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from typer.testing import CliRunner

import sparsefx
from sparsefx.cli import app

MODULE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)), torch.randn(2, 64)
"""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What every command reads when all is well."""
    (tmp_path / "bad_files_net.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = sparsefx.finalize(sparsefx.sparsify(net(), algorithm="static"))
    sparsefx.export_onnx(model, torch.randn(2, 64), tmp_path / "good.onnx", dynamic_batch=True)
    sparsefx.compact_onnx(tmp_path / "good.onnx", tmp_path / "compact.onnx")
    torch.save(model.state_dict(), tmp_path / "good.pt")
    np.save(tmp_path / "data.npy", np.zeros((4, 64), np.float32))
    onnx.save(onnx.load("good.onnx"), "external.onnx", save_as_external_data=True, location="external.data", size_threshold=0)
    return tmp_path


READERS: dict[str, Callable[[str], list[str]]] = {
    "audit": lambda file: ["audit", file],
    "compact": lambda file: ["compact", file],
    "compact to": lambda file: ["compact", file, "--out", "out.onnx"],
    "densify": lambda file: ["densify", file],
    "densify to": lambda file: ["densify", file, "--out", "out.onnx"],
    "quantize": lambda file: ["quantize", file, "--calibration", "data.npy", "--out", "out.onnx"],
}
WRITERS: dict[str, Callable[[str], list[str]]] = {
    "compact": lambda out: ["compact", "good.onnx", "--out", out],
    "densify": lambda out: ["densify", "compact.onnx", "--out", out],
    "quantize": lambda out: ["quantize", "good.onnx", "--calibration", "data.npy", "--out", out],
    "export": lambda out: ["export", "bad_files_net:build", "--out", out],
    "prune": lambda out: ["prune", "bad_files_net:build", "--out", out],
    "prune plan": lambda out: ["prune", "bad_files_net:build", "--plan", out],
    "prune page": lambda out: ["prune", "bad_files_net:build", "--html", out],
    "audit page": lambda out: ["audit", "good.onnx", "--html", out],
    "model page": lambda out: ["audit", "bad_files_net:build", "--html", out],
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }


def refused(folder: Path, arguments: list[str]) -> str:
    """The one line on stderr; every file is as before, and none is new."""
    before = contents(folder)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert contents(folder) == before
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "(unexpected;" not in result.stderr
    return result.stderr


def damaged(folder: Path, kind: str) -> str:
    """Make the bad file; its name."""
    good = (folder / "good.onnx").read_bytes()
    path = folder / "bad.onnx"
    if kind == "cut short":
        path.write_bytes(good[: len(good) * 2 // 3])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "another format":
        path.write_bytes((folder / "good.pt").read_bytes())
    elif kind == "operator set":
        model = onnx.load_from_string(good)
        model.opset_import[0].version = 999
        path.write_bytes(model.SerializeToString())
    elif kind == "external data missing":
        (folder / "external.data").unlink()
        return "external.onnx"
    elif kind == "external data cut short":
        data = folder / "external.data"
        data.write_bytes(data.read_bytes()[:-1000])
        return "external.onnx"
    elif kind == "tensor cut short":
        model = onnx.load_from_string(good)
        tensor = next(tensor for tensor in model.graph.initializer if len(tensor.raw_data) > 100)
        tensor.raw_data = tensor.raw_data[:-4]
        path.write_bytes(model.SerializeToString())
    elif kind == "a folder":
        (folder / "folder.onnx").mkdir()
        return "folder.onnx"
    elif kind == "missing":
        return "missing.onnx"
    return "bad.onnx"


KINDS = {
    "cut short": "not an ONNX file, or it is cut short|cannot be read",
    "empty": "not an ONNX file, or it is empty|not an ONNX file",
    "another format": "not an ONNX file",
    "operator set": "version 999 of the ONNX operator set",
    "external data missing": "external data file 'external.data' is missing; put it beside the model",
    "external data cut short": "external data file 'external.data' is cut short",
    "tensor cut short": "cannot be read",
    "a folder": "this is a directory",
    "missing": "no such file",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", READERS)
def test_bad_onnx_files(folder: Path, command: str, kind: str) -> None:
    (folder / "out.onnx").write_bytes(b"an earlier file")
    name = damaged(folder, kind)
    told = refused(folder, READERS[command](name))
    assert any(text in told for text in KINDS[kind].split("|")), told


@pytest.mark.parametrize("command", READERS)
def test_files_without_weights(folder: Path, command: str) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 64])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "none.onnx")
    if command == "quantize":
        assert "there is no weight to quantise" in refused(folder, READERS[command]("none.onnx"))
        return
    before = contents(folder)
    result = CliRunner().invoke(app, READERS[command]("none.onnx"))
    assert result.exit_code == 0, result.output
    assert "0 weights" in result.stdout or "no weight of" in result.stdout
    assert {name: content for name, content in contents(folder).items() if name != "out.onnx"} == before


@pytest.mark.parametrize("command", READERS)
def test_every_byte_from_which_a_file_can_be_cut(folder: Path, command: str) -> None:
    """At many lengths: an error of ours, or success where what is left is a whole file; never anything unexpected."""
    good = (folder / "compact.onnx").read_bytes()
    generator = np.random.default_rng(0)
    for length in sorted(generator.integers(0, len(good), 12).tolist()):
        (folder / "bad.onnx").write_bytes(good[:length])
        result = CliRunner().invoke(app, READERS[command]("bad.onnx"))
        assert result.exit_code == 1, length
        assert result.stderr.startswith("error: ")
        assert "(unexpected;" not in result.stderr, (length, result.stderr)
        assert not (folder / "out.onnx").exists()


@pytest.mark.parametrize("command", ["export", "prune"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["cut short", "missing", "empty", "other weights", "a folder"])
def test_bad_weights_files(folder: Path, command: str, suffix: str, kind: str) -> None:
    path = folder / f"bad{suffix}"
    state = nn.Linear(3, 3).state_dict() if kind == "other weights" else net().state_dict()
    if suffix == ".pt":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind in ("missing", "a folder"):
        path.unlink()
    if kind == "a folder":
        path.mkdir()
    out = "out.onnx" if command == "export" else "out.pt"
    (folder / out).write_bytes(b"an earlier file")
    told = refused(folder, [command, "bad_files_net:build", "--weights", path.name, "--out", out])
    assert path.name in told


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def name_of(command: str) -> str:
    return {"prune": "old.pt", "prune plan": "old.safetensors"}.get(command, "old.html" if "page" in command else "old.onnx")


@pytest.mark.parametrize("command", WRITERS)
def test_a_full_disk(folder: Path, command: str) -> None:
    (folder / name_of(command)).write_bytes(b"an earlier file")
    with little_room(200):
        told = refused(folder, WRITERS[command](name_of(command)))
    assert "free some space" in told


@pytest.mark.parametrize("command", WRITERS)
def test_no_permission(folder: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As whoever runs the tests may write anywhere, the system's answer is made up: nothing can be made in the folder."""
    (folder / name_of(command)).write_bytes(b"an earlier file")
    right = os.mkdir

    def refuse(path: Any, *rest: Any, **options: Any) -> None:
        if Path(path).parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        right(path, *rest, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    told = refused(folder, WRITERS[command](name_of(command)))
    assert "Permission denied" in told
    assert "choose another path" in told


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("place", ["a folder", "nowhere"])
def test_places_that_are_no_file(folder: Path, command: str, place: str) -> None:
    (folder / "folder.onnx").mkdir()
    told = refused(folder, WRITERS[command]("folder.onnx" if place == "a folder" else "nowhere/out.onnx"))
    assert ("this is a directory" if place == "a folder" else "does not exist; create it first") in told


def test_of_several_files_none_is_written_where_one_cannot_be(folder: Path) -> None:
    (folder / "old.pt").write_bytes(b"an earlier file")
    arguments = ["prune", "bad_files_net:build", "--out", "old.pt", "--plan", "nowhere/plan.safetensors"]
    assert "nowhere does not exist; create it first" in refused(folder, arguments)
