"""Models that are caught by the obvious implementation of capture, eligibility and export."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsefx
from sparsefx.errors import CaptureError, ExportError, StateError

pytestmark = pytest.mark.filterwarnings("ignore:this model was sparsified and is being trained")


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return self.query(query) - self.key(key)  # type: ignore[no-any-return]


def test_one_tensor_given_twice_is_two_inputs(tmp_path: Path) -> None:
    x, other = torch.randn(2, 32), torch.randn(2, 32)
    model = sparsefx.sparsify(TwoInputs(), example_inputs=(x, x))
    program = sparsefx.graph(model, (x, x))
    assert torch.equal(program(x, other), model(x, other))
    assert len(sparsefx.export_onnx(model, (x, x), tmp_path / "m.onnx").initializers) == 2


class Language(nn.Module):
    """Embedding, one block, and a head whose scores go through ``last``."""

    def __init__(self, last: Callable[[Tensor], Tensor], classes: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.block = nn.Linear(32, 32)
        self.head = nn.Linear(32, classes)
        self.last = last

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.head(functional.relu(self.block(self.embedding(tokens)))))


@pytest.mark.parametrize(
    "last",
    [
        lambda scores: scores,
        lambda scores: scores * 0.5,
        lambda scores: scores / 0.7,
        lambda scores: scores.mean(1),
        lambda scores: scores.masked_fill(torch.arange(scores.shape[-1]) > 20, -1e9),
        lambda scores: functional.cross_entropy(scores.flatten(0, 1), torch.zeros(10, dtype=torch.long)),
        lambda scores: scores.argmax(-1),
    ],
)
def test_the_head_of_a_language_model_is_found_behind_what_scores_go_through(last: Callable[[Tensor], Tensor]) -> None:
    tokens = torch.randint(0, 100, (2, 5))
    rows = {layer.name: layer for layer in sparsefx.audit(Language(last), example_inputs=tokens).layers}
    assert rows["block"].sparse
    assert not rows["head"].sparse
    assert "classification head" in rows["head"].reason


def test_a_vocabulary_projection_is_found_behind_any_function() -> None:
    model = Language(lambda scores: 30 * torch.tanh(scores / 30), classes=100)
    rows = {layer.name: layer for layer in sparsefx.audit(model, example_inputs=torch.randint(0, 100, (2, 5))).layers}
    assert "vocabulary" in rows["head"].reason
    assert rows["block"].sparse


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(100, 32), nn.LSTM(32, 32, 2, bidirectional=True, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lstm(self.embedding(tokens))[0]  # type: ignore[no-any-return]


def test_a_recurrent_encoder_without_a_head_has_none() -> None:
    layers = sparsefx.audit(Recurrent(), example_inputs=torch.randint(0, 100, (2, 5))).layers
    assert len(layers) == 8
    assert all(layer.sparse for layer in layers)


class Conditional(nn.Module):
    """An image model that also takes a class: its last convolution is no language model's head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first, self.last = nn.Embedding(10, 32), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 16, 3)

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        return self.last(self.first(image) + self.embedding(label)[:, :, None, None])  # type: ignore[no-any-return]


def test_the_last_convolution_of_a_conditional_image_model_may_be_sparse() -> None:
    inputs = (torch.randn(2, 32, 8, 8), torch.tensor([1, 2]))
    assert all(layer.sparse for layer in sparsefx.audit(Conditional(), example_inputs=inputs).layers)


class Positions(nn.Module):
    """As many positions as channels: the blocks' layers are no vocabulary projections."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 64), nn.Embedding(64, 64)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(2)))
        self.head = nn.Linear(64, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)  # type: ignore[no-any-return]


def test_layers_as_wide_as_the_table_of_positions_are_sparse() -> None:
    layers = sparsefx.audit(Positions(), example_inputs=torch.randint(0, 50, (2, 9))).layers
    assert {layer.name for layer in layers if not layer.sparse} == {"head"}


def test_memory_shared_by_parameters_that_are_no_neighbours_is_found() -> None:
    base = torch.randn(96, 32)
    model = nn.ModuleList(nn.Linear(32, rows) for rows in (96, 32, 32))
    for layer, part in zip(model, (base, base[8:40], base[64:]), strict=True):
        layer.weight = nn.Parameter(part)
    layers = sparsefx.audit(nn.Sequential(*model)).layers
    assert all("shares memory" in layer.reason for layer in layers)


class HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bare, self.layer = nn.Parameter(torch.randn(32, 64)), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(functional.linear(x, self.bare[:, :32]))  # type: ignore[no-any-return]


def test_a_weight_that_is_used_in_part_has_a_row_with_its_reason() -> None:
    rows = {layer.parameter: layer for layer in sparsefx.audit(HalfUsed(), example_inputs=torch.randn(2, 32)).layers}
    assert not rows["bare"].sparse
    assert rows["bare"].reason


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["first", "second", "second.weight", "sec*"])
def test_a_tied_weight_can_be_excluded_by_any_of_its_names(name: str) -> None:
    model = sparsefx.sparsify(Tied(), exclude=name)
    assert set(sparsefx.masks(model)) == {"other.weight"}


class ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(2))  # type: ignore[no-any-return]


def test_example_inputs_are_left_as_they_were(tmp_path: Path) -> None:
    x = torch.randn(2, 32)
    before = x.clone()
    model = sparsefx.sparsify(ChangesItsInput(), example_inputs=(x,))
    sparsefx.export_onnx(model, (x,), tmp_path / "m.onnx")
    assert torch.equal(x, before)


def test_an_export_leaves_a_table_with_max_norm_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(20, 32, max_norm=0.1), nn.Linear(32, 32))
    before = copy.deepcopy(model.state_dict())
    sparsefx.export_onnx(model, (torch.randint(0, 20, (2, 3)),), tmp_path / "m.onnx")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(32, 32), deque([1], maxlen=4)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)  # type: ignore[arg-type]
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("inputs", [None, torch.randn(2, 32)])
def test_nothing_stays_in_what_a_forward_remembers(inputs: Tensor | None) -> None:
    model = Remembers()
    sparsefx.audit(model, example_inputs=inputs)
    assert list(model.seen) == [1]


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(x)
        return y if skip is None else y + skip


def test_a_graph_without_inputs_is_refused_where_arguments_may_be_left_out() -> None:
    model = sparsefx.sparsify(Optional())
    with pytest.raises(CaptureError, match=r"left out \(skip\)"):
        sparsefx.graph(model)
    x = torch.randn(2, 32)
    assert torch.equal(sparsefx.graph(model, (x,))(x), model(x))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.output)


def test_a_parameter_may_be_called_output(tmp_path: Path) -> None:
    report = sparsefx.export_onnx(Named(), (torch.randn(2, 32),), tmp_path / "m.onnx")
    assert [weight.source for weight in report.initializers] == ["output"]
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": nn.Sequential(nn.LazyLinear(4))}, StateError),
        ({"dynamic_shapes": ({9: "batch"},)}, ExportError),
        ({"dynamic_shapes": 7}, ExportError),
        ({"path": None}, ExportError),
        ({"path": 5.5}, ExportError),
        ({"path": "with\0nul.onnx"}, ExportError),
        ({"path": "x" * 300}, ExportError),
    ],
)
def test_bad_calls_of_export_are_one_line_errors(change: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    call = {"model": nn.Linear(32, 32), "example_inputs": (torch.randn(2, 32),), "path": tmp_path / "m.onnx", **change}
    with pytest.raises(error) as caught:
        sparsefx.export_onnx(**call)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class ImageAndText(nn.Module):
    """Projections that are as wide as the table of positions, behind which no layer stands: no vocabulary projections."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(96, 64), nn.Embedding(32, 64)
        self.register_buffer("ids", torch.arange(32))
        self.text, self.image, self.words = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 96)

    def forward(self, tokens: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.tokens(tokens) + self.positions(self.ids[: tokens.shape[1]])
        text = self.text(x.mean(1)).square()
        return text, self.image(image).square(), self.words(text)


@pytest.mark.parametrize("inputs", [None, (torch.ones(2, 5, dtype=torch.long), torch.ones(2, 64))])
def test_projections_as_wide_as_the_table_of_positions_are_sparse(inputs: Any) -> None:
    rows = {layer.name: layer for layer in sparsefx.audit(ImageAndText(), example_inputs=inputs).layers}
    assert rows["text"].sparse
    assert rows["image"].sparse
    assert "vocabulary projection (96 outputs" in rows["words"].reason


@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize(
    "rearranged",
    [
        lambda p: p.t().flatten().view(32, 32),
        lambda p: p.t().reshape(16, 64).reshape(32, 32),
        lambda p: p.view(32, 16, 2).transpose(1, 2).reshape(32, 32),
    ],
)
def test_a_weight_that_is_copied_in_another_order_is_not_masked_along_a_wrong_axis(
    rearranged: Callable[[Tensor], Tensor], with_inputs: bool
) -> None:
    class Rearranging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(32, 32)), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.last(functional.linear(x, rearranged(self.weight)))
            return made

    model = sparsefx.sparsify(Rearranging(), example_inputs=torch.randn(2, 32) if with_inputs else None)
    assert set(sparsefx.masks(model)) == {"last.weight"}
    found = sparsefx.audit(model)
    assert "weight" in found.unseen or any(row.parameter == "weight" and row.reason for row in found.layers)
