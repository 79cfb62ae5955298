"""Inputs padded with zeros: which weights, to what size, the same outputs bit for bit, and what the audit says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_models import make_sparse
from torch import Tensor, nn
from typer.testing import CliRunner

import sparsefx
from sparsefx.cli import app
from sparsefx.onnx_audit import audit_onnx
from sparsefx.passes.lower_onnx import lower_onnx


class Net(nn.Module):
    """An image of three channels, convolutions of 24 and 40, and linear layers of 24 on two and on three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.middle = nn.Conv2d(24, 40, 3, padding=1)
        self.last = nn.Conv2d(40, 24, 1)
        self.tokens = nn.Linear(24, 24)
        self.head = nn.Linear(24, 8)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.norm(self.stem(image)))))
        return self.head(self.tokens(self.last(x).flatten(2).transpose(1, 2)).mean(1))


def whole_numbers(model: nn.Module) -> nn.Module:
    """Small whole numbers as weights: every order of summation gives the same bits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator).float())
    return model.eval()


def sparse_net() -> Net:
    model = Net()
    make_sparse(model.stem, pattern="2:4-padded")
    for module in (model.middle, model.last, model.tokens, model.head):
        make_sparse(module)
    return model.eval()


def run(path: Path, image: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])


def shapes(path: Path) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_weight_is_padded_where_it_pays(tmp_path: Path, dtype: torch.dtype) -> None:
    model, image = sparse_net().to(dtype), torch.randn(2, 3, 6, 6).to(dtype)
    plain = lower_onnx(model, image, tmp_path / "p.onnx", dynamic_batch=True)
    padded = lower_onnx(model, image, tmp_path / "m.onnx", dynamic_batch=True, pad_channels=True)
    found = {weight.name: weight.shape for weight in padded.initializers}
    assert found == {
        "stem.weight": (24, 4, 3, 3),
        "middle.weight": (40, 32, 3, 3),
        "last.weight": (24, 48, 1, 1),
        "tokens.weight": (32, 24),
        "head.weight": (8, 32),
    }
    assert all(weight.pattern == "2:4" for weight in padded.initializers)
    assert "middle.weight: 24 inputs padded with zeros to 32, by a Pad in front of the op that reads it" in padded.checks
    assert plain.largest_relative_error < 1e-2 if dtype == torch.float16 else padded.largest_relative_error < 1e-5
    before, after = onnx.load(tmp_path / "p.onnx").graph, onnx.load(tmp_path / "m.onnx").graph
    assert [str(value) for value in before.input] == [str(value) for value in after.input]
    assert sum(node.op_type == "Pad" for node in after.node) == 5
    old = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in before.initializer}
    for tensor in after.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name in found:
            inside = tuple(slice(0, size) for size in old[tensor.name].shape)
            np.testing.assert_array_equal(array[inside], old[tensor.name])
            assert np.count_nonzero(array) == np.count_nonzero(old[tensor.name])


def test_outputs_are_equal_bit_for_bit(tmp_path: Path) -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Identity()  # type: ignore[assignment]

        def forward(self, image: Tensor) -> Tensor:
            x = torch.relu(self.middle(torch.relu(self.stem(image))))
            return self.head(self.tokens(self.last(x).flatten(2).transpose(1, 2)))

    model = whole_numbers(Plain())
    make_sparse(model.stem, pattern="2:4-padded")  # type: ignore[arg-type]
    for module in (model.middle, model.last, model.tokens, model.head):
        make_sparse(module)  # type: ignore[arg-type]
    image = torch.randint(-2, 3, (2, 3, 6, 6)).float()
    lower_onnx(model, image, tmp_path / "p.onnx")
    lower_onnx(model, image, tmp_path / "m.onnx", pad_channels=True)
    wanted = model(image).detach().numpy()
    assert shapes(tmp_path / "m.onnx")["middle.weight"] == [40, 32, 3, 3]
    np.testing.assert_array_equal(run(tmp_path / "p.onnx", image), wanted)
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", image), wanted)
    assert 100 < np.abs(wanted).max() < 2**24  # whole numbers up to there are exact


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: make_sparse(nn.Linear(32, 8)), (2, 32)),  # fits already
        (lambda: make_sparse(nn.Linear(8, 8)), (2, 8)),  # sixteen inputs at half the work are no less than eight
        (lambda: nn.Linear(24, 8), (2, 24)),  # dense
        (lambda: make_sparse(nn.Linear(20, 8), pattern="unstructured"), (2, 20)),
        (lambda: make_sparse(nn.Conv2d(24, 8, 1, groups=2), pattern="2:4"), (2, 24, 3, 3)),
        (lambda: make_sparse(nn.ConvTranspose2d(24, 8, 2), axis=0), (2, 24, 3, 3)),
        (lambda: nn.Conv2d(1, 8, 3), (2, 1, 6, 6)),
        (lambda: make_sparse(nn.Linear(24, 10)), (2, 24)),  # its ten outputs stand in the way whatever its inputs are
        (lambda: make_sparse(nn.Linear(24, 10)), (2, 3, 24)),
    ],
)
def test_where_it_does_not_pay_the_file_is_the_same(tmp_path: Path, make: Any, inputs: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(inputs)
    lower_onnx(model, x, tmp_path / "p.onnx")
    lower_onnx(model, x, tmp_path / "m.onnx", pad_channels=True)
    assert (tmp_path / "p.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()


def test_two_readers_of_one_weight_and_of_one_value(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = make_sparse(nn.Linear(24, 24))
            self.other = make_sparse(nn.Linear(24, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.other(x) + self.other(self.twice(self.twice(x)))

    report = lower_onnx(Shared(), torch.randn(3, 24), tmp_path / "m.onnx", pad_channels=True)
    assert {weight.shape for weight in report.initializers} == {(24, 32), (16, 32)}
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert sum(node.op_type == "Pad" for node in graph.node) == 3  # x is padded once for both layers that read it


@pytest.mark.parametrize("layer", [lambda: nn.Linear(24, 24), lambda: nn.Conv2d(24, 24, 1)])
def test_a_shared_pad_stands_in_front_of_the_first_layer_that_needs_it(tmp_path: Path, layer: Any) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = make_sparse(layer())
            self.between = make_sparse(layer())

        def forward(self, x: Tensor) -> Tensor:
            features = self.first(x)
            return self.between(features) + self.first(features)

    lower_onnx(Again(), torch.randn(3, 24, 5, 24), tmp_path / "m.onnx", pad_channels=True)
    ops = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert ops.count("Pad") == 2  # the features are padded once for both layers that read them


def test_a_weight_that_something_else_reads_stays(tmp_path: Path) -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make_sparse(nn.Linear(24, 24))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + (self.layer.weight * x.mean()).sum(0)

    report = lower_onnx(Read(), torch.randn(3, 24), tmp_path / "m.onnx", pad_channels=True)
    assert [weight.shape for weight in report.initializers] == [(24, 24)]


def test_the_audit_tells_what_padding_would_do_and_did(tmp_path: Path) -> None:
    model, image = sparse_net(), torch.randn(2, 3, 6, 6)
    lower_onnx(model, image, tmp_path / "p.onnx", samples=1)
    lower_onnx(model, image, tmp_path / "m.onnx", samples=1, pad_channels=True)
    before = {row.name: row for row in audit_onnx(tmp_path / "p.onnx")}
    after = {row.name: row for row in audit_onnx(tmp_path / "m.onnx")}
    assert before["middle.weight"].reason == "24 inputs is not a multiple of 16"
    assert before["middle.weight"].note == "with 32 inputs, the rest zeros, it would be 2:4: export with pad_channels=True"
    assert before["stem.weight"].note.startswith("with 4 inputs")
    assert after["middle.weight"].eligible
    assert "its 24 inputs were padded with zeros" in after["middle.weight"].note
    assert after["stem.weight"].reason == "4 inputs is not a multiple of 16"


def test_compact_weights_go_with_it(tmp_path: Path) -> None:
    model, x = make_sparse(nn.Linear(120, 96)), torch.randn(2, 120)
    lower_onnx(model, x, tmp_path / "p.onnx", pad_channels=True)
    lower_onnx(model, x, tmp_path / "c.onnx", pad_channels=True, weights="compact")
    assert (tmp_path / "c.onnx").stat().st_size < (tmp_path / "p.onnx").stat().st_size
    sparsefx.densify_onnx(tmp_path / "c.onnx")
    assert (tmp_path / "c.onnx").read_bytes() == (tmp_path / "p.onnx").read_bytes()


def test_the_padded_pattern_is_promised_without_padding_too(tmp_path: Path) -> None:
    model = Net().eval()
    make_sparse(model.stem, pattern="2:4-padded")
    report = lower_onnx(model, torch.randn(2, 3, 6, 6), tmp_path / "m.onnx", samples=1)
    assert "stem.weight: 2:4-padded in the file (Conv axis 1)" in report.checks


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "padding_net.py").write_text("from torch import nn\n\ndef build():\n    return nn.Linear(24, 16)\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(make_sparse(nn.Linear(24, 16)).state_dict(), tmp_path / "w.pt")
    arguments = ["export", "padding_net:build", "--weights", str(tmp_path / "w.pt"), "--input-shape", "2x24", "--pad-channels"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "m.onnx")])
    assert result.exit_code == 0, result.output
    assert "weight: 24 inputs padded with zeros to 32" in result.output
