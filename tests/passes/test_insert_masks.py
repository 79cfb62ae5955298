"""The masked graph: which nodes are rewritten, over which tensors, and that it computes what the model computes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import sparsefx
from sparsefx.capture import capture
from sparsefx.capture.graph_uses import attribute
from sparsefx.errors import CaptureError, VerificationError
from sparsefx.passes.base import Pipeline
from sparsefx.passes.finalize_masks import FinalizeMasks
from sparsefx.passes.insert_masks import InsertMasks, masked_graph
from sparsefx.program import Program, Stage
from sparsefx.sparse_parameter import sparse_parameters
from sparsefx.verify import MASKS, is_masked_op, verify, weight_and_mask
from tests.capture_models import Bare, Branching, Recurrent, Residual, Scaled, Tied, Words
from tests.equality import assert_same_computation

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
GOLDEN = Path(__file__).parent.parent / "golden"
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
MODELS: dict[str, tuple[Any, Any]] = {
    "residual": (Residual, lambda: torch.randn(2, 3, 8, 8)),
    "bare": (Bare, lambda: torch.randn(2, 5, 16)),
    "tied": (Tied, lambda: torch.randn(3, 16)),
    "recurrent": (Recurrent, lambda: torch.randn(2, 5, 16)),
    "words": (Words, lambda: torch.randint(0, 64, (2, 5))),
    "scaled": (lambda: nn.Sequential(Scaled(16, 16)), lambda: torch.randn(2, 16)),
}


def _sparse(name: str) -> tuple[nn.Module, Any]:
    make, inputs = MODELS[name]
    data = inputs()
    return sparsefx.sparsify(make(), example_inputs=data), data


def _masked(model: nn.Module, inputs: Any) -> Program:
    return Pipeline((InsertMasks(),)).run(capture(model, inputs)).program


@pytest.mark.filterwarnings("ignore:this model was sparsified")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_graph_and_module_compute_the_same_bit_for_bit(name: str, with_inputs: bool, training: bool) -> None:
    model, data = _sparse(name)
    model.train(training)
    graph_module = masked_graph(model, data if with_inputs else None)
    assert_same_computation(model, graph_module, (data,), {})


@pytest.mark.parametrize("name", ["residual", "recurrent", "tied"])
def test_the_graph_reads_as_it_should(name: str) -> None:
    model, data = _sparse(name)
    if name == "recurrent" and TORCH < (2, 15):
        pytest.skip("older versions of torch.export take an LSTM apart into other views than the golden text has")
    text = str(masked_graph(model.eval(), data).graph) + "\n"
    path = GOLDEN / f"{name}_masked.txt"
    assert text == path.read_text(), f"the graph of {name} changed; where that is meant, write it to {path}"


def test_every_use_is_masked_by_the_models_own_mask() -> None:
    for name in MODELS:
        model, data = _sparse(name)
        program = _masked(model, data)
        assert program.stage is Stage.MASKED
        assert program.history == ("capture", "insert_masks")
        verify(program)
        masks = {id(record.mask): id(parameter) for _, parameter, record in sparse_parameters(model)}
        pairs = {
            id(attribute(program.whole, str(mask.target))): id(attribute(program.whole, str(weight.target)))
            for weight, mask in (weight_and_mask(node) for node in program.whole.graph.nodes if is_masked_op(node))
        }
        assert pairs == masks


def test_masks_that_move_move_in_the_graph_too() -> None:
    model, data = _sparse("tied")
    graph_module = masked_graph(model, data)
    record = next(record for _, _, record in sparse_parameters(model))
    before = graph_module(data)
    record.mask.logical_not_()
    assert not torch.equal(graph_module(data), before)


def test_dense_layers_keep_their_plain_ops() -> None:
    model, data = _sparse("residual")
    plain = {
        str(node.args[1]): str(node.target)
        for node in masked_graph(model, data).graph.nodes
        if node.op == "call_function" and "aten.conv" in str(node.target)
    }
    assert set(plain) == {"stem_weight", "depthwise_weight", "grouped_weight", "mask_weight_default"}
    masked = [str(node.target) for node in masked_graph(model, data).graph.nodes if is_masked_op(node)]
    assert sorted(masked) == [
        "sparsefx.mask_weight.default",
        "sparsefx.masked_conv2d.default",
        "sparsefx.masked_conv_transpose2d.default",
    ]


def test_a_second_run_changes_nothing_and_the_first_leaves_its_input_alone() -> None:
    model, data = _sparse("residual")
    program = capture(model, data)
    before = str(program.whole.graph)
    first = InsertMasks().run(program)
    assert first.changed
    assert str(program.whole.graph) == before
    second = InsertMasks().run(replace(first.program, stage=Stage.MASKED))
    assert not second.changed
    assert second.program.graphs is first.program.graphs


def test_a_dense_model_is_left_alone() -> None:
    result = Pipeline((InsertMasks(),)).run(capture(Tied(), torch.randn(3, 16)))
    assert not result.changed
    assert result.program.stage is Stage.MASKED


def test_the_state_dict_of_the_graph_has_the_models_keys() -> None:
    model, data = _sparse("residual")
    assert set(masked_graph(model, data).state_dict()) == set(model.state_dict())


def test_a_padded_convolution_without_inputs_and_sizes_as_numbers() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(16, 16, 3))
            self.again = nn.Parameter(torch.randn(16, 16, 3))
            self.layer = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")

        def forward(self, data: Tensor) -> Tensor:
            data = functional.conv1d(data, self.kernel, stride=2, padding=1)
            data = functional.conv1d(data, weight=self.again, bias=None, padding="same")
            return self.layer(data[..., None].expand(-1, -1, -1, 5))

    model, data = sparsefx.sparsify(Functional()), torch.randn(2, 16, 12)
    graph_module = masked_graph(model)
    targets = [str(node.target) for node in graph_module.graph.nodes if is_masked_op(node)]
    assert targets.count("sparsefx.mask_weight.default") == 1
    assert len(targets) == 3
    assert torch.equal(graph_module(data), model(data))


def test_parts_are_masked_where_the_whole_cannot_be_captured() -> None:
    model, data = Branching(), torch.randn(4, 16)
    sparsefx.sparsify(model, example_inputs=data)
    program = _masked(model, data)
    assert any(is_masked_op(node) for node in program.graphs["body"].graph.nodes)
    with pytest.raises(CaptureError, match="cannot be captured as one graph"):
        masked_graph(model, data)


def test_the_graph_can_be_copied_and_pickled() -> None:
    model, data = _sparse("tied")
    graph_module = masked_graph(model, data)
    expected = graph_module(data)
    assert torch.equal(copy.deepcopy(graph_module)(data), expected)
    if TORCH < (2, 15):
        pytest.skip("older versions of torch.fx cannot pickle graphs of code with postponed annotations")
    torch.manual_seed(0)
    traced = masked_graph(model)
    assert torch.equal(pickle.loads(pickle.dumps(traced))(data), expected)


def test_finalizing_takes_the_masks_out_and_changes_no_output() -> None:
    for name in MODELS:
        model, data = _sparse(name)
        model.eval()
        masked = _masked(model, data)
        expected = masked.whole(data)
        result = Pipeline((FinalizeMasks(),)).run(masked)
        assert result.changed
        assert result.program.stage is Stage.FINALIZED
        assert not any(is_masked_op(node) for node in result.program.whole.graph.nodes)
        assert not hasattr(result.program.whole, MASKS)
        assert torch.equal(result.program.whole(data), expected)
        assert any(is_masked_op(node) for node in masked.whole.graph.nodes)
        again = Pipeline((FinalizeMasks(),)).run(result.program)
        assert not again.changed


def test_finalizing_bakes_zeros_into_weights_that_were_trained_without_a_runtime() -> None:
    model, data = _sparse("tied")
    program = _masked(model.eval(), data)
    with torch.no_grad():
        model.first.weight.add_(1)
    expected = program.whole(data)
    finalized = Pipeline((FinalizeMasks(),)).run(program).program
    assert torch.equal(finalized.whole(data), expected)
    assert torch.equal(model(data), expected)
    with torch.no_grad():
        model.first.weight.add_(1)
    with pytest.raises(VerificationError, match=r"'first.weight' holds values.*Made by pass 'finalize_masks'"):
        verify(finalized)


def _with_graph(program: Program, graph_module: fx.GraphModule) -> Program:
    return replace(program, graphs=MappingProxyType({"": graph_module}))


def test_verification_names_the_pass_that_broke_a_program() -> None:
    model, data = _sparse("tied")
    captured = capture(model, data)
    unmasked = replace(captured, stage=Stage.MASKED, history=("capture", "insert_masks", "lose_a_mask"))
    with pytest.raises(
        VerificationError, match=r"reads 'first.weight' without its mask.*'lose_a_mask', which ran after capture, ins"
    ):
        verify(unmasked)
    masked = _masked(model, data)
    with pytest.raises(VerificationError, match="is a masked op"):
        verify(replace(masked, stage=Stage.CAPTURED))

    foreign = copy.deepcopy(masked.whole)
    with pytest.raises(VerificationError, match="not the model's own Parameter"):
        verify(_with_graph(masked, foreign))

    record = next(record for _, _, record in sparse_parameters(model))
    record.mask = record.mask.clone()
    with pytest.raises(VerificationError, match="a mask that is not the model's own"):
        verify(masked)


def test_a_malformed_graph_is_refused_before_any_pass_runs() -> None:
    model, data = _sparse("tied")
    program = capture(model, data)
    graph_module = copy.copy(program.whole)
    linear = next(node for node in graph_module.graph.nodes if "linear" in str(node.target))
    list(graph_module.graph.nodes)[-1].append(linear)  # behind its users
    with pytest.raises(VerificationError, match="not well formed"):
        Pipeline((InsertMasks(),)).run(_with_graph(program, graph_module))


def test_a_pass_from_the_wrong_stage_is_refused_by_name() -> None:
    model, data = _sparse("tied")
    with pytest.raises(
        VerificationError, match=r"'finalize_masks' was given a program at stage CAPTURED.*expected FINALIZED or MASKED"
    ):
        Pipeline((FinalizeMasks(),)).run(capture(model, data))
