"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from sparsefx.cli import app
from sparsefx.errors import OptionError
from sparsefx.targets import load_target
from sparsefx.targets_inputs import tensors_of_shapes, torchvision_inputs
from sparsefx.weights_file import load_weights

MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))

def with_inputs():
    return net(), (torch.rand(2, 32),)

def number():
    return 3

def broken():
    raise ValueError("no such weights")

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x

def branches():
    return Branches(), (torch.rand(2, 32),)

ready = net()
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    """The one line on stderr of a command that exits with status 1."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of the user's in the working directory."""
    (tmp_path / "my_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_models", None)


def test_audit_of_an_own_model_prints_a_table() -> None:
    result = run("audit", "my_models:with_inputs")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Sequential: pattern 2:4, density 0.5\n2 of 2 Linear/Conv weights would be sparse")
    assert "FLOPs; " in result.stdout
    assert result.stderr == ""


def test_audit_as_json_with_a_density() -> None:
    result = run("audit", "my_models:net", "--json", "--pattern", "unstructured", "--density", "0.25")
    content = json.loads(result.stdout)
    assert content["settings"]["pattern"] == "unstructured"
    assert content["settings"]["density"] == 0.25
    assert [layer["name"] for layer in content["layers"]] == ["0", "2"]


def test_audit_counts_flops_with_an_input_shape_and_not_without_inputs() -> None:
    given = json.loads(run("audit", "my_models:ready", "--json", "--input-shape", "4x32").stdout)
    assert given["totals"]["flops"] == 2 * 4 * (32 * 64 + 64 * 8)
    none = json.loads(run("audit", "my_models:with_inputs", "--json", "--no-inputs").stdout)
    assert none["totals"]["flops"] is None


def test_audit_writes_a_page(tmp_path: Path) -> None:
    result = run("audit", "my_models:net", "--html", "page.html")
    assert result.exit_code == 0
    assert result.stderr == "wrote page.html\n"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("audit", "nothing"), "expected torchvision:resnet50"),
        (("audit", "no_such_module:net"), "no module 'no_such_module'"),
        (("audit", "my_models:nett"), "did you mean net"),
        (("audit", "my_models:number"), "gave a int; expected a torch.nn.Module"),
        (("audit", "my_models:broken"), "failed with ValueError: no such weights"),
        (("audit", "my_models:torch"), "is a module; expected a callable"),
        (("audit", "my_models:net", "--pattern", "5:4"), "5:4"),
        (("audit", "my_models:net", "--density", "0.3"), "density 0.3 was given for pattern '2:4'"),
        (("audit", "my_models:net", "--pattern", "unstructured", "--density", "2"), "(0, 1]"),
        (("audit", "my_models:net", "--input-shape", "4xx"), "input shape '4xx' was given"),
        (("audit", "my_models:net", "--input-shape", "4x32:str"), "input shape"),
        (("audit", "my_models:net", "--no-inputs", "--input-shape", "4x32"), "leave one out"),
        (("audit", "my_models:net", "--html", "missing/page.html"), "cannot be written"),
        (("audit", "missing.onnx"), "missing.onnx"),
        (("export", "my_models:net", "--out", "a.onnx"), "pass --input-shape"),
        (("export", "a.onnx", "--out", "b.onnx"), "is an ONNX file already"),
        (("export", "my_models:with_inputs", "--out", "missing/a.onnx"), "missing"),
        (("export", "my_models:with_inputs", "--out", "a.onnx", "--weights", "none.pt"), "there is no file none.pt"),
        (("export", "my_models:with_inputs", "--out", "a.onnx", "--pattern", "nonsense"), "nonsense"),
    ],
)
def test_refusals_are_one_line(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    assert told in refused(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("__")) == ["my_models.py"]


def test_wrong_inputs_of_the_users_are_an_error_and_not_replaced() -> None:
    assert "error: " in refused("audit", "my_models:net", "--input-shape", "4x31")


def test_a_model_that_export_refuses_is_audited_in_silence_and_not_exported(tmp_path: Path) -> None:
    result = run("audit", "my_models:branches", "--json")
    assert result.stderr == ""
    assert [layer["rung"] for layer in json.loads(result.stdout)["layers"]] == [2]
    refused("export", "my_models:branches", "--out", "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_debug_shows_the_traceback() -> None:
    result = run("audit", "my_models:number", "--debug")
    assert isinstance(result.exception, OptionError)


def test_a_wrong_command_line_exits_with_2() -> None:
    for arguments in (("audit",), ("audit", "x:y", "--nonsense"), ("nonsense",), ("demo", "--seeds", "0")):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output


def test_help_and_version() -> None:
    assert "audit" in run("--help").stdout
    assert "--dynamic-batch" in run("export", "--help").stdout


def test_export_of_a_state_dict_then_audit_of_the_file(tmp_path: Path) -> None:
    trained = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    torch.save({"state_dict": {f"module.{name}": value for name, value in trained.state_dict().items()}}, tmp_path / "w.pt")
    result = run(
        "export", "my_models:with_inputs", "--out", "net.onnx", "--weights", "w.pt", "--pattern", "2:4", "--dynamic-batch"
    )
    assert result.exit_code == 0, result.output
    assert "checked" in result.stdout
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load("net.onnx").graph.initializer}
    kept = torch.from_numpy(stored["0.weight"].copy())
    assert (kept != 0).float().mean() == 0.5
    assert torch.equal(kept[kept != 0], trained[0].weight[kept != 0])
    assert "batch" in str(onnx.load("net.onnx").graph.input[0])

    table = run("audit", "net.onnx")
    assert table.exit_code == 0, table.output
    assert "2 of 2 weights" in table.stdout
    content = json.loads(run("audit", "net.onnx", "--json").stdout)
    assert [weight["pattern"] for weight in content["weights"]] == ["2:4", "2:4"]
    assert run("audit", "net.onnx", "--html", "net.html").exit_code == 0
    assert "Sparsity of net.onnx" in (tmp_path / "net.html").read_text()


def test_audit_of_something_that_is_not_onnx(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    assert "text.onnx" in refused("audit", "text.onnx")


def test_weights_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    torch.save({"weight": torch.zeros(4, 5), "extra": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(OptionError, match=r"1 missing \(bias\); 1 unexpected \(extra\); 1 of another shape \(weight\)"):
        load_weights(model, tmp_path / "other.pt")
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
def test_weights_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(OptionError, match="cannot be read as a state_dict"):
        load_weights(nn.Linear(2, 2), tmp_path / name)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Path("x")}, tmp_path / "code.pt")
    with pytest.raises(OptionError, match="cannot be read"):
        load_weights(nn.Linear(2, 2), tmp_path / "code.pt")


def test_safetensors_are_loaded(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, str(tmp_path / "w.safetensors"))
    model = nn.Linear(2, 2)
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_input_shapes_take_the_models_dtype_and_an_explicit_one() -> None:
    first, second = tensors_of_shapes(["2x3", "4:int64"], nn.Linear(2, 2).double())
    assert (first.dtype, tuple(first.shape)) == (torch.float64, (2, 3))
    assert (second.dtype, tuple(second.shape)) == (torch.int64, (4,))


def test_torchvision_models_by_name() -> None:
    pytest.importorskip("torchvision")
    content = json.loads(run("audit", "torchvision:resnet18", "--json").stdout)
    dense = [layer["name"] for layer in content["layers"] if not layer["sparse"]]
    assert dense == ["conv1"]
    assert len(content["layers"]) == 21
    assert "did you mean resnet" in refused("audit", "torchvision:resnet5")


def test_timm_models_by_name() -> None:
    pytest.importorskip("timm")
    target = load_target("timm:vit_tiny_patch16_224", batch=2)
    assert target.example_inputs[0].shape == (2, 3, 224, 224)
    assert "did you mean vit_tiny" in refused("audit", "timm:vit_tiny_patch16_225")


def test_transformers_by_type_class_and_file(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config |= {"vocab_size": 96, "architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = load_target("transformers:./config.json")
    assert type(target.model) is transformers.BertForMaskedLM
    assert target.example_inputs["input_ids"].max() < 96
    result = run("audit", "transformers:./config.json")
    assert result.exit_code == 0, result.output
    assert "bert.encoder.layer.[0-1].intermediate.dense" in result.stdout or "intermediate.dense" in result.stdout
    assert "did you mean bert" in refused("audit", "transformers:bertt")
    assert "model_type 'none'" in _with_config(tmp_path, '{"model_type": "none"}')
    assert "cannot be read" in _with_config(tmp_path, "{")


def _with_config(folder: Path, text: str) -> str:
    (folder / "config.json").write_text(text)
    return refused("audit", "transformers:./config.json")


def test_a_library_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'sparsefx[zoo]'" in refused("audit", "timm:resnet18")


def test_random_state_is_left_alone_by_made_up_inputs() -> None:
    model = nn.Linear(1, 1)
    state = torch.get_rng_state()
    torchvision_inputs("resnet18", "torchvision.models.resnet", model, 1)
    assert torch.equal(torch.get_rng_state(), state)
