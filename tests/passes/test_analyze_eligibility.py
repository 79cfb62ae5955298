"""Eligibility: the rule, every refusal with its reason, selections, and what a row says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparsefx import patterns
from sparsefx.errors import EligibilityError, OptionError, PatternError
from sparsefx.passes.analyze_eligibility import Analysis, Eligibility, analyze
from sparsefx.report import LayerReport
from sparsefx.sparse_parameter import SparseParameter, add_record
from tests.capture_models import Bare, Branching, Disagreeing, Opaque, Recurrent, Residual, Scaled, Standardised, Tied, Words

TWO_OF_FOUR = patterns.parse("2:4")


def _analyze(model: nn.Module, inputs: Any = None, pattern: str = "2:4", **options: Any) -> Analysis:
    return analyze(model, example_inputs=inputs, pattern=patterns.parse(pattern), **options)


def _rows(model: nn.Module, inputs: Any = None, **options: Any) -> dict[str, LayerReport]:
    return {layer.name: layer for layer in _analyze(model, inputs, **options).layers}


@pytest.mark.parametrize("inputs", [None, torch.ones(2, 3, 8, 8)])
def test_the_papers_rule_on_convolutions(inputs: Any) -> None:
    rows = _rows(Residual(), inputs)
    assert list(rows) == ["stem", "body", "depthwise", "grouped", "wide", "up"]
    assert {name for name, row in rows.items() if row.sparse} == {"body", "wide", "up"}
    assert rows["stem"].reason.startswith("3 input channels is not a multiple of 16; it stays dense")
    assert rows["depthwise"].reason.startswith("1 input channels per group")
    assert rows["grouped"].reason.startswith("8 input channels per group")
    assert (rows["up"].reduction_axis, rows["up"].kind) == (0, "ConvTranspose2d")
    assert (rows["body"].pattern, rows["body"].density) == ("2:4", 0.5)
    assert (rows["stem"].pattern, rows["stem"].density) == ("", 1.0)


def test_floating_point_operations_and_rungs() -> None:
    rows = _rows(Residual(), torch.ones(2, 3, 8, 8))
    assert rows["stem"].flops == 2 * (2 * 16 * 8 * 8) * 3 * 9
    assert rows["depthwise"].flops == 2 * (2 * 16 * 8 * 8) * 9
    assert rows["wide"].flops == 2 * (2 * 64 * 8 * 8) * 16
    assert rows["up"].flops == 2 * (2 * 64 * 8 * 8) * 8 * 4
    assert {row.rung for row in rows.values()} == {1}
    assert rows["body"].call_sites == ("body: conv2d",)
    rows = _rows(Residual())
    assert {(row.rung, row.flops) for row in rows.values()} == {(3, None)}


def test_groups_of_a_transposed_convolution_are_not_crossed() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(96, 8, 2, groups=4), nn.ConvTranspose2d(64, 64, 2, groups=2))
    rows = _rows(model)
    assert rows["0"].reason.startswith("24 input channels per group")
    assert rows["1"].sparse
    assert rows["1"].tensor_core_reason != ""
    lenient = _rows(model, eligibility=Eligibility(multiple=8), pattern="5:16")
    assert "'5:16' cannot be had" in lenient["0"].reason  # 24 channels of a group are no whole groups of 16, though 96 are
    assert lenient["1"].sparse


def test_bare_parameters_and_tied_layers_are_rows_too() -> None:
    rows = _rows(Bare(), torch.randn(2, 5, 16))
    assert {name: (row.sparse, row.reduction_axis) for name, row in rows.items()} == {
        "weight": (True, 1),
        "kernel": (True, 1),
        "matrix": (True, 0),
    }
    rows = _rows(Tied(), torch.randn(3, 16))
    assert list(rows) == ["first", "again"]
    assert rows["first"].call_sites == ("first: linear", "second: linear")
    assert rows["again"].call_sites == ("again: linear", "again: linear")
    assert rows["again"].flops == 2 * (2 * 3 * 16 * 16)


@pytest.mark.parametrize("inputs", [None, torch.ones(3, 16)])
def test_uses_that_sum_along_different_axes_are_refused(inputs: Any) -> None:
    row = _rows(Disagreeing(), inputs)["layer"]
    assert not row.sparse
    assert "different axes" in row.reason
    assert "layer: linear along axis 1" in row.reason


@pytest.mark.parametrize("inputs", [None, torch.ones(2, 16, 6, 6)])
def test_a_weight_that_is_standardised_is_refused(inputs: Any) -> None:
    row = _rows(nn.Sequential(Standardised(16, 16, 3)), inputs)["0"]
    assert not row.sparse
    assert "an op through which zeros do not surely stay zeros" in row.reason


@pytest.mark.parametrize("inputs", [None, torch.ones(2, 16)])
def test_a_weight_that_is_scaled_is_accepted(inputs: Any) -> None:
    assert _rows(nn.Sequential(Scaled(16, 16)), inputs)["0"].sparse


def test_an_opaque_subclass_needs_inputs() -> None:
    model = nn.Sequential(Opaque(16, 16))
    assert "pass example_inputs" in _rows(model)["0"].reason
    assert _rows(model, torch.ones(2, 16))["0"].sparse


@pytest.mark.parametrize("inputs", [None, torch.ones(2, 5, 16)])
def test_recurrent_layers_and_attention(inputs: Any) -> None:
    rows = _rows(Recurrent(), inputs)
    assert {"lstm.weight_hr_l1", "gru.weight_hh_l0_reverse", "attention.in_proj_weight", "cross.k_proj_weight"} <= set(rows)
    assert {"attention.out_proj", "cross.out_proj"} <= set(rows)
    assert all(row.sparse for row in rows.values()), {name: row.reason for name, row in rows.items() if row.reason}
    assert rows["attention.in_proj_weight"].kind == "MultiheadAttention.in_proj_weight"


def test_language_models_keep_embeddings_ties_and_heads_dense() -> None:
    tokens = torch.randint(0, 64, (2, 5))
    for inputs in (None, tokens):
        rows = _rows(Words(), inputs)
        assert {name: row.sparse for name, row in rows.items()} == {"blocks.0": True, "blocks.1": True, "head": False}
        assert "classification head" in rows["head"].reason
        assert _rows(Words(), inputs, eligibility=Eligibility(language_model_heads=True))["head"].sparse
        rows = _rows(Words(classes=64), inputs)
        assert "vocabulary projection (64 outputs" in rows["head"].reason
        tied = Words(classes=64)
        tied.head.weight = tied.embedding.weight
        rows = _rows(tied, inputs)
        assert rows["head"].parameter == "head.weight"
        assert "tied to an embedding" in rows["head"].reason
        both = Eligibility(language_model_heads=True, vocabulary_projections=True)
        assert not _rows(tied, inputs, eligibility=both)["head"].sparse


def test_repeated_blocks_and_vision_heads_are_no_heads() -> None:
    blocks = Words(vocabulary=48)
    blocks.blocks[0] = nn.Linear(16, 48)  # as wide as the vocabulary, by chance
    blocks.blocks[1] = nn.Linear(48, 16)
    rows = _rows(blocks)
    assert rows["blocks.0"].sparse
    vision = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16, 10))
    assert _rows(vision, torch.ones(1, 16, 1, 1))["2"].sparse
    assert _rows(vision)["2"].sparse


@pytest.mark.parametrize("change", ["weight_norm", "spectral_norm", "prune"])
def test_computed_weights_are_refused_by_name(change: str) -> None:
    layer = nn.Linear(16, 16)
    if change == "prune":
        prune.l1_unstructured(layer, "weight", 0.5)
    else:
        getattr(parametrizations, change)(layer)
    model = nn.Sequential(nn.Linear(16, 16), layer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for inputs in (None, torch.ones(2, 16)):
        analysis = _analyze(model, inputs)
        (first, second) = analysis.layers
        assert (first.sparse, second.sparse, second.name, second.shape) == (True, False, "1", (16, 16))
        assert "is computed" in second.reason
        assert analysis.unseen == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _refusal(parameter: nn.Parameter) -> str:
    layer = nn.Linear(16, 16)
    layer.weight = parameter
    return _rows(nn.Sequential(layer))["0"].reason


def test_dtypes_and_memory_that_a_mask_cannot_serve() -> None:
    assert "is complex" in _refusal(nn.Parameter(torch.randn(16, 16, dtype=torch.complex64)))
    assert "quantised or integer" in _refusal(nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False))
    assert "several of its elements share one place" in _refusal(nn.Parameter(torch.randn(1, 16).expand(16, 16)))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert _refusal(nn.Parameter(torch.randn(16, 16, dtype=dtype))) == ""


def test_two_parameters_over_one_memory_are_refused_and_neighbours_are_not() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    rows = _rows(model)
    assert "shares memory with 1.weight" in rows["0"].reason
    assert "shares memory with 0.weight" in rows["1"].reason
    assert rows["2"].sparse
    flat = torch.randn(2 * 256)
    model[0].weight, model[1].weight = (nn.Parameter(part.view(16, 16)) for part in flat.chunk(2))
    assert all(row.sparse for row in _rows(model).values())


def test_lazy_and_meta_models() -> None:
    rows = _rows(nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 16)), torch.ones(1, 16))
    assert "uninitialised" in rows["0"].reason
    assert rows["1"].sparse
    with torch.device("meta"):
        model = Residual()
    rows = _rows(model)
    assert rows["body"].sparse
    assert rows["body"].empty_channels == 0


def test_frozen_weights_stay_dense_only_where_others_train() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].requires_grad_(False)
    rows = _rows(model)
    assert "frozen" in rows["0"].reason
    assert rows["1"].sparse
    assert _rows(model, eligibility=Eligibility(frozen=True))["0"].sparse
    assert all(row.sparse for row in _rows(model.requires_grad_(False)).values())


def test_include_and_exclude() -> None:
    def chosen(**options: Any) -> set[str]:
        return {name for name, row in _rows(Residual(), **options).items() if row.sparse}

    assert chosen() == {"body", "wide", "up"}
    assert chosen(include="body") == {"body"}
    assert chosen(include=["b*", "wide.weight"]) == {"body", "wide"}
    assert chosen(include=nn.Conv2d) == {"body", "wide"}
    assert chosen(exclude=lambda name, module: isinstance(module, nn.Conv2d) and module.groups > 1) == {"body", "up"}
    assert chosen(exclude=(nn.ConvTranspose2d, "body")) == {"wide"}
    rows = _rows(Residual(), include="b*", exclude="body")
    assert rows["body"].reason == "is excluded"
    assert rows["wide"].reason == "is not among the included layers"
    assert "not a multiple" in _rows(Residual(), include="stem")["stem"].reason
    nested = nn.Sequential(Recurrent())
    assert not any(row.sparse for row in _rows(nested, exclude="0").values())
    assert {name for name, row in _rows(nested, exclude=nn.MultiheadAttention).items() if row.sparse} == {
        name for name in _rows(nested) if "attention" not in name and "cross" not in name
    }


def test_a_selection_that_matches_nothing_names_what_is_close() -> None:
    with pytest.raises(EligibilityError, match=r"include was given 'bdy', which matches no.*close to it: body"):
        _rows(Residual(), include="bdy")
    with pytest.raises(EligibilityError, match=r"exclude was given 'zzz\*'.*the first layers are: stem, body"):
        _rows(Residual(), exclude="zzz*")
    with pytest.raises(OptionError, match="expected a layer name"):
        _rows(Residual(), include=[3])


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match="multiple=0"):
        Eligibility(multiple=0)
    with pytest.raises(PatternError):
        analyze(Tied(), pattern=TWO_OF_FOUR, density=0.3)
    with pytest.raises(OptionError, match="from sparsefx"):
        analyze(Tied(), pattern="2:4")  # type: ignore[arg-type]


def test_what_a_pattern_cannot_have_is_a_reason() -> None:
    model = nn.Sequential(nn.Linear(16, 30), nn.Linear(32, 32))
    rows = _rows(model, pattern="2:4-transposable")
    assert "pattern '2:4-transposable' cannot be had" in rows["0"].reason
    assert rows["1"].sparse


def test_fitness_for_the_hardware_is_told_apart_from_eligibility() -> None:
    model = nn.Sequential(nn.Linear(16, 30), nn.Linear(32, 32))
    rows = _rows(model)
    assert rows["0"].sparse
    assert rows["0"].tensor_core_reason == "30 outputs is not a multiple of 8"
    assert rows["1"].tensor_core_reason == ""
    assert "is not 2:4" in _rows(model, pattern="unstructured")["1"].tensor_core_reason
    assert _rows(model, exclude="1")["1"].tensor_core_reason == "is dense"


def test_parameters_that_nothing_was_seen_to_read_are_listed() -> None:
    model = Branching()
    assert set(_analyze(model).unseen) == {"projection", "packed"}
    assert _analyze(model, torch.randn(4, 16)).unseen == ()


def test_layers_that_the_run_does_not_reach_are_eligible_and_cost_nothing() -> None:
    model = Tied()
    model.auxiliary = nn.Linear(16, 32)
    row = _rows(model, torch.ones(2, 16))["auxiliary"]
    assert (row.sparse, row.rung, row.flops) == (True, 4, 0)


def test_a_sparse_model_is_reported_by_its_live_masks() -> None:
    model = Residual()
    mask = torch.zeros_like(model.body.weight, dtype=torch.bool)
    mask[:4] = True
    with torch.no_grad():
        model.body.weight.mul_(mask)
    add_record(model.body, "weight", SparseParameter(patterns.parse("unstructured"), 0.25, 1, mask))
    row = _rows(model, torch.ones(1, 3, 8, 8), exclude="body")["body"]
    assert (row.sparse, row.reason, row.pattern, row.density, row.empty_channels) == (True, "", "unstructured", 0.25, 12)
    assert row.effective_flops == row.flops // 4  # type: ignore[operator]
