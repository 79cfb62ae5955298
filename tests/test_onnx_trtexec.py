"""The trtexec command for a file, TensorRT's lines on sparsity, and how both stand beside the audit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from sparsefx.cli import app
from sparsefx.errors import OptionError
from sparsefx.onnx_audit import audit_onnx
from sparsefx.onnx_files import compact_onnx
from sparsefx.onnx_trtexec import read_log, trtexec_command

OLD = """\
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) Layers eligible for sparse math: conv1 + relu1, conv2 + add + relu2, fc
[08/05/2024-12:06:54] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: conv2 + add + relu2
"""
NEW = """\
[I] [TRT] (Sparsity) Found 9 layer(s) eligible to use sparse tactics: earlier
[I] [TRT] (Sparsity) Chose 9 layer(s) using sparse tactics: earlier
[I] [TRT] (Sparsity) Found 2 layer(s) eligible to use sparse tactics: PWN(conv1, relu1), conv2 || conv3
[I] [TRT] (Sparsity) Chose 1 layer(s) using sparse tactics: conv2 || conv3
"""


def weight_2_4(rows: int, columns: int, dtype: str = "float32") -> np.ndarray:
    """Ones where ``column % 4 < 2``: 2:4 along axis 1."""
    return np.tile(np.array([1, 1, 0, 0]), (rows, columns // 4)).astype(dtype)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Convolutions of 256 and 16 inputs with names that the logs above have, and an open batch."""
    tensors = {
        "w1": weight_2_4(256, 256)[..., None, None],
        "w2": weight_2_4(256, 256)[..., None, None],
        "w3": weight_2_4(16, 256)[..., None, None],
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="conv1"),
        helper.make_node("Conv", ["a", "w2"], ["b"], name="conv2"),
        helper.make_node("Conv", ["b", "w3"], ["y"], name="fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 256, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    path = tmp_path / "my model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("text", "verdicts", "counts"),
    [(OLD, ["eligible", "picked", "eligible"], (3, 1)), (NEW, ["eligible", "picked", "not eligible"], (2, 1))],
)
def test_layers_of_both_forms_of_log(
    tmp_path: Path, model: Path, text: str, verdicts: list[str], counts: tuple[int, int]
) -> None:
    (tmp_path / "log").write_text(text)
    log = read_log(tmp_path / "log")
    assert [log.verdict(weight) for weight in audit_onnx(model)] == verdicts
    assert (log.eligible_layers, log.picked_layers) == counts


def test_a_log_with_numbers_only_leaves_single_weights_unknown(tmp_path: Path, model: Path) -> None:
    (tmp_path / "log").write_text(
        "(Sparsity) Found 3 layer(s) eligible to use sparse tactics\n(Sparsity) Chose 0 layer(s) using sparse tactics\n"
    )
    log = read_log(tmp_path / "log")
    assert (log.eligible_layers, log.picked_layers) == (3, 0)
    assert {log.verdict(weight) for weight in audit_onnx(model)} == {"unknown"}


def test_a_log_that_names_picked_layers_only(tmp_path: Path, model: Path) -> None:
    (tmp_path / "log").write_text(
        "(Sparsity) Found 2 layer(s) eligible to use sparse tactics\n"
        "(Sparsity) Chose 1 layer(s) using sparse tactics: conv1 + relu1\n"
    )
    log = read_log(tmp_path / "log")
    assert [log.verdict(weight) for weight in audit_onnx(model)] == ["picked", "unknown", "unknown"]


def test_no_layer_eligible(tmp_path: Path, model: Path) -> None:
    (tmp_path / "log").write_text(
        "[TRT] (Sparsity) Layers eligible for sparse math: \n"
        "[TRT] (Sparsity) TRT inference plan picked sparse implementation for layers:\n"
    )
    assert {read_log(tmp_path / "log").verdict(weight) for weight in audit_onnx(model)} == {"not eligible"}


def test_a_log_without_such_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("[I] Throughput: 501 qps\n")
    with pytest.raises(OptionError, match="run trtexec with --sparsity=enable --verbose"):
        read_log(tmp_path / "log")
    with pytest.raises(OptionError, match="could not be read"):
        read_log(tmp_path / "none")


def test_the_command_names_precision_and_open_sizes(model: Path) -> None:
    command = trtexec_command(model, audit_onnx(model))
    assert command == (
        f"trtexec '--onnx={model}' --sparsity=enable --fp16 --minShapes=x:1x256x8x8 --optShapes=x:8x256x8x8 "
        "--maxShapes=x:8x256x8x8 --verbose > 'my model.trtexec.log' 2>&1"
    )


def test_the_command_densifies_compact_files_first(model: Path) -> None:
    packed = model.with_name("c.onnx")
    assert compact_onnx(model, packed).weights == ("w1", "w2", "w3")
    command = trtexec_command(packed, audit_onnx(packed))
    plain = packed.with_name("c.plain.onnx")
    assert command.startswith(f"sparsefx densify {packed} --out {plain} && trtexec --onnx={plain} --sparsity=enable --fp16")


def test_prediction_by_channels_and_type(model: Path) -> None:
    first, _, last = audit_onnx(model)
    assert (first.likely_picked, first.note) == (True, "build with FP16, BF16 or INT8 allowed: float32 has no sparse kernel")
    assert (last.likely_picked, last.eligible) == (False, True)
    assert last.note.startswith("256 inputs and 16 outputs: below about 256 on a side")
    assert first.bytes == {"plain": 256 * 256 * 4, "compact": 256 * 64 * 8 + 256 * 32, "sparse_initializer": 256 * 128 * 12}


def test_json_has_the_promised_form_and_more_on_request(tmp_path: Path, model: Path) -> None:
    runner = CliRunner()
    plain = runner.invoke(app, ["audit", str(model), "--json"])
    keys = ["name", "op", "axis", "pattern", "density", "eligible", "reason"]
    content = json.loads(plain.stdout)
    assert list(content) == ["weights"]
    assert [list(row) for row in content["weights"]] == [keys] * 3
    assert content["weights"][0] == {
        "name": "w1", "op": "Conv", "axis": 1, "pattern": "2:4", "density": 0.5, "eligible": True, "reason": "",
    }  # fmt: skip
    assert "trtexec '--onnx=" in plain.stderr
    (tmp_path / "log").write_text(OLD)
    full = json.loads(
        runner.invoke(app, ["audit", str(model), "--json", "--details", "--trtexec-log", str(tmp_path / "log")]).stdout
    )
    assert [row["tensorrt"] for row in full["weights"]] == ["eligible", "picked", "eligible"]
    assert full["weights"][0]["bytes"]["plain"] == 256 * 256 * 4


def test_table_shows_both_verdicts(tmp_path: Path, model: Path) -> None:
    (tmp_path / "log").write_text(OLD)
    text = CliRunner().invoke(app, ["audit", str(model), "--trtexec-log", str(tmp_path / "log"), "--details"]).stdout
    assert "TensorRT's log: 3 layers eligible, 1 picked." in text
    assert "TensorRT would likely pick its sparse kernel for 2 of them" in text
    assert "trtexec" not in text


def test_options_for_onnx_files_are_refused_for_models() -> None:
    result = CliRunner().invoke(app, ["audit", "torchvision:resnet18", "--details"])
    assert result.exit_code == 1
    assert "are for ONNX files" in result.stderr
