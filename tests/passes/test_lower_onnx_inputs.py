"""Inputs and outputs of unusual kinds: what is compared, what names they get, and that nothing is written unchecked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import ExportError

needs_free_keywords = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14),
    reason="torch.export of torch 2.11 takes no free sizes within **kwargs (2.14 does)",
)


class Layer(nn.Module):
    """A linear layer of 16 channels, called by a function."""

    def __init__(self, call: Callable[..., Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16, dtype=dtype)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.layer, x)


def sizes_of(path: Path) -> dict[str, list[str | int]]:
    """The sizes of each input and output of a file, by name; names where they are free."""
    graph = onnx.load(path).graph
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


@pytest.mark.parametrize(
    ("call", "inputs"),
    [
        pytest.param(lambda layer, x: layer(x.float()), torch.randn(2, 16).bfloat16(), id="bfloat16 enters"),
        pytest.param(lambda layer, x: (layer(x), x.bfloat16().float()), torch.randn(2, 16), id="bfloat16 in between"),
        pytest.param(lambda layer, x: (layer(x), x.abs().to(torch.uint16)), torch.randn(2, 16), id="uint16 comes out"),
    ],
)
def test_every_type_is_compared(tmp_path: Path, call: Callable[..., Any], inputs: Tensor) -> None:
    report = sparsefx.export_onnx(Layer(call), inputs, tmp_path / "model.onnx")
    assert report.samples == 3
    assert report.outputs


def test_a_bfloat16_model_whose_copy_in_float32_does_not_run_is_not_written(tmp_path: Path) -> None:
    model = Layer(lambda layer, x: layer(x.to(torch.bfloat16)).float(), torch.bfloat16)
    with pytest.raises(ExportError, match=r"float32 copy of the model, which does not run on the example inputs"):
        sparsefx.export_onnx(model, torch.randn(2, 16), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16])
def test_whole_numbers_up_to_the_largest(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Layer(lambda layer, x: layer.weight[:2] + (x.to(torch.int64) > 3))
    inputs = torch.tensor([[torch.iinfo(dtype).max, *range(15)]] * 2, dtype=dtype)
    assert sparsefx.export_onnx(model, inputs, tmp_path / "model.onnx").samples == 3


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_input_that_is_given_back_keeps_its_name(tmp_path: Path, dynamic: bool) -> None:
    model = Layer(lambda layer, x: {"sum": layer(x), "x": x, "weight": layer.weight, "again": [x, None]})
    report = sparsefx.export_onnx(model, torch.randn(2, 16), tmp_path / "model.onnx", dynamic_batch=dynamic)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [value.name for value in graph.input] == ["x"]
    assert len({row.name for row in report.outputs}) == 4
    assert report.outputs[0].name == "sum"


class Nested(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor], *more: Tensor, named: dict[str, Tensor], **others: Tensor) -> Tensor:
        return pair[0] + pair[1].sum() + more[0].sum() + named["key"].sum() + others["other"].sum()


@needs_free_keywords
@pytest.mark.parametrize(
    "shapes",
    [
        {"pair": ({0: "a"}, {0: "b"}), "more": ({0: "c"},), "named": {"key": ("d", None)}, "other": {1: "e"}},
        (({0: "a"}, {0: "b"}), ({0: "c"},), {"key": ("d", None)}, {"other": {1: "e"}}),
    ],
)
def test_sizes_of_nested_inputs_get_their_own_names(tmp_path: Path, shapes: Any) -> None:
    args = (torch.randn(4, 16), torch.randn(3)), torch.randn(5, 2)
    kwargs = {"other": torch.randn(3, 7), "named": {"key": torch.randn(6, 2)}}
    sparsefx.export_onnx(Nested(), (args, kwargs), tmp_path / "model.onnx", dynamic_shapes=shapes)
    assert sizes_of(tmp_path / "model.onnx") == {
        "pair_0": ["a", 16],
        "pair_1": ["b"],
        "more_0": ["c", 2],
        "named_key": ["d", 2],
        "other": [3, "e"],
        "output": ["a", 16],
    }


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        return self.layer(x) + others["y"]


@needs_free_keywords
@pytest.mark.parametrize("batch", [1, 2])
def test_a_free_batch_of_what_a_forward_takes_by_any_name(tmp_path: Path, batch: int) -> None:
    inputs = (torch.randn(batch, 16),), {"y": torch.randn(batch, 16)}
    report = sparsefx.export_onnx(Keywords(), inputs, tmp_path / "model.onnx", dynamic_batch=True)
    assert report.samples == 4
    assert sizes_of(tmp_path / "model.onnx") == {name: ["batch", 16] for name in ("x", "y", "output")}
