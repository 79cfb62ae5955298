"""Capture: the ladder's rungs, what they see of each parameter, and that a model is left as it was."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsefx.capture import capture
from sparsefx.capture.arguments import describe_arguments, split_arguments
from sparsefx.capture.graph_uses import parameters_read
from sparsefx.capture.observe import observe_run
from sparsefx.errors import CaptureError
from sparsefx.program import CallSite, Program, Rung, Stage
from sparsefx.verify import verify
from tests.capture_models import Bare, Branching, Disagreeing, OneHot, Opaque, Recurrent, Residual, Tied, Words


def _facts(program: Program, name: str) -> list[tuple[str, int | None, int]]:
    return [(site.op, site.reduction_axis, int(site.rung)) for site in program.call_sites[name]]


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "identity": {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
        "attributes": [{key: id(value) for key, value in module.__dict__.items()} for module in model.modules()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "requires": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "random": (torch.get_rng_state(), random.getstate()),
    }


def _assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for part in ("identity", "attributes", "requires", "modes"):
        assert before[part] == after[part], part
    assert all(a is b for a, b in zip(before["gradients"], after["gradients"], strict=True))
    assert torch.equal(before["random"][0], after["random"][0])
    assert before["random"][1] == after["random"][1]


def test_export_sees_functional_uses_of_bare_parameters() -> None:
    program = capture(Bare(), torch.randn(2, 5, 16))
    assert program.stage is Stage.CAPTURED
    assert program.complete
    assert _facts(program, "weight") == [("linear", 1, 1)]
    assert _facts(program, "matrix") == [("matmul", 0, 1)]
    assert _facts(program, "kernel") == [("conv1d", 1, 1)]
    flops = {name: [site.flops for site in sites] for name, sites in program.call_sites.items()}
    assert flops == {"weight": [2 * 10 * 16 * 32], "matrix": [2 * 10 * 32 * 16], "kernel": [2 * 10 * 16 * 16 * 3]}
    verify(program)


def test_without_inputs_fx_sees_the_same_uses_without_shapes() -> None:
    program = capture(Bare())
    assert not program.complete
    assert _facts(program, "weight") == [("linear", 1, 3)]
    assert _facts(program, "matrix") == [("matmul", 0, 3)]
    assert _facts(program, "kernel") == [("conv1d", 1, 3)]
    assert program.call_sites["weight"][0].flops is None
    verify(program)


def test_the_observed_run_sees_views_and_casts() -> None:
    model = Branching()
    program = capture(model, torch.randn(4, 16))
    assert program.complete
    assert any(reason.startswith("torch.export") for reason in program.resisted)
    assert _facts(program, "body.0.weight") == [("linear", 1, 2)]
    assert _facts(program, "projection") == [("linear", 1, 2)]
    assert _facts(program, "packed") == [("linear", 1, 2), ("linear", 1, 2)]
    assert program.call_sites["packed"][0].flops == 2 * 4 * 48 * 48
    assert "" not in program.graphs
    assert "body" in program.graphs
    with pytest.raises(CaptureError, match=r"cannot be captured as one graph.*torch\.export"):
        _ = program.whole


@pytest.mark.parametrize("inputs", [None, "real"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("model", "shape"), [(Branching(), (4, 16)), (Residual(), (2, 3, 8, 8)), (Recurrent(), (2, 5, 16)), (Tied(), (3, 16))]
)
def test_a_model_is_left_exactly_as_it_was(model: nn.Module, shape: tuple[int, ...], training: bool, inputs: Any) -> None:
    model.train(training)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    list(model.parameters())[-1].requires_grad_(False)
    handle = model.register_forward_hook(lambda *_: None)
    before = _snapshot(model)
    capture(model, None if inputs is None else torch.ones(shape))
    _assert_same(before, _snapshot(model))
    handle.remove()


def test_a_model_that_raises_is_named_with_its_inputs_and_left_as_it_was() -> None:
    model = Residual().train()
    before = _snapshot(model)
    with pytest.raises(
        CaptureError, match=r"Residual was given example inputs \(float32\[2, 5, 8, 8\]\).*train mode.*pass a tensor"
    ):
        capture(model, torch.ones(2, 5, 8, 8))
    _assert_same(before, _snapshot(model))


def test_graphs_read_the_models_own_parameters_and_buffers() -> None:
    model = Residual()
    own = {id(parameter) for parameter in model.parameters()}
    for inputs in (torch.randn(2, 3, 8, 8), None):
        graph_module = capture(model, inputs).whole
        read = list(parameters_read(graph_module))
        assert read
        assert all(id(parameter) in own for _, parameter in read)
    exported = capture(model, torch.randn(2, 3, 8, 8)).whole
    exported(torch.randn(2, 3, 8, 8))
    assert model.norm.num_batches_tracked == 1


def test_tied_weights_are_one_parameter_with_all_their_uses() -> None:
    for inputs in (torch.randn(3, 16), None):
        program = capture(Tied(), inputs)
        assert program.aliases["first.weight"] == ("first.weight", "second.weight")
        assert [site.op for site in program.call_sites["first.weight"]] == ["linear", "linear"]
        assert len(program.call_sites["again.weight"]) == 2
        assert "second.weight" not in program.call_sites


def test_a_product_with_one_hot_rows_is_an_embedding_at_every_rung() -> None:
    model, positions = OneHot(), torch.randint(0, 32, (3, 5, 2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    observed = observe_run(model, (positions,), {}, names)
    exported = capture(model, (positions,)).call_sites["table"]
    traced = capture(model).call_sites["table"]
    for sites in ([site for site in observed if site.parameter == "table"], exported, traced):
        assert [(site.op, site.reduction_axis, site.flops, site.problem) for site in sites] == [("embedding", None, None, "")]


def test_a_transposed_use_has_the_other_axis() -> None:
    for inputs, rung in ((torch.randn(3, 16), 1), (None, 3)):
        assert _facts(capture(Disagreeing(), inputs), "layer.weight") == [("linear", 1, rung), ("matmul", 0, rung)]


def test_recurrent_and_attention_weights_are_seen_at_every_rung() -> None:
    model, data = Recurrent(), torch.randn(2, 5, 16)
    weights = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    for inputs in (data, None):
        program = capture(model, inputs)
        assert {site.reduction_axis for name in weights for site in program.call_sites[name]} == {1}, inputs
        assert not any(site.problem for name in weights for site in program.call_sites[name])


class _Einsum(nn.Module):
    def __init__(self, equation: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.equation = equation
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, data: Tensor) -> Tensor:
        return torch.einsum(self.equation, data, self.weight)


@pytest.mark.parametrize(
    ("equation", "shape", "axis", "problem"),
    [
        ("bnd,kd->bnk", (8, 16), 1, ""),
        ("bnd,dhk->bnhk", (16, 2, 4), 0, ""),
        ("bnd,hkd->bnhk", (2, 4, 16), 2, ""),
        ("bnd,hkld->bnhkl", (2, 4, 2, 16), None, "axis 3"),
        ("bnd,nd->b", (5, 16), None, "exactly one axis"),
    ],
)
def test_einsum_is_read_by_its_equation(equation: str, shape: tuple[int, ...], axis: int | None, problem: str) -> None:
    (site,) = capture(_Einsum(equation, shape), torch.randn(2, 5, 16)).call_sites["weight"]
    assert site.reduction_axis == axis
    assert problem in site.problem


class _Views(nn.Module):
    def __init__(self, view: Any, shape: tuple[int, ...] = (32, 16)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.view = view

    def forward(self, data: Tensor) -> Tensor:
        return torch.matmul(data, self.view(self.weight))


@pytest.mark.parametrize("inputs", ["export", "trace"])
@pytest.mark.parametrize(
    ("view", "axis"),
    [
        (lambda w: w.t(), 1),
        (lambda w: w.T.contiguous(), 1),
        (lambda w: w.transpose(0, 1).reshape(16, 32), 1),
        (lambda w: w.permute(1, 0).double().float(), 1),
        (lambda w: w.chunk(2)[0].t(), 1),
        (lambda w: w.unflatten(0, (2, 16)).select(0, 1), None),
        (lambda w: w.t()[:, :8] * 2, 1),
        (lambda w: w.reshape(16, 32), None),
        (lambda w: w.abs().t(), None),
        (lambda w: (w + 1).t(), None),
    ],
)
def test_axes_are_followed_through_views_and_never_guessed(view: Any, axis: int | None, inputs: str) -> None:
    program = capture(_Views(view), torch.randn(4, 16) if inputs == "export" else None)
    (site,) = program.call_sites["weight"]
    assert site.reduction_axis == axis
    assert bool(site.problem) == (axis is None)


class _Switching(nn.Module):
    """Half-traced before it resists, with a parameter that others read too."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.shared = shared
        self.inner = nn.Linear(16, 16)

    def forward(self, data: Tensor) -> Tensor:
        data = self.shared(self.inner(data))
        return data if data.sum() > 0 else -data


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(16, 16)
        self.switching = _Switching(self.shared)
        self.last = nn.Linear(16, 16)

    def forward(self, data: Tensor) -> Tensor:
        return self.last(self.shared(self.switching(data)))


def test_a_submodule_that_resists_is_a_leaf_and_its_children_are_traced_alone() -> None:
    model = _Outer()
    program = capture(model)
    targets = [str(node.target) for node in program.whole.graph.nodes if node.op == "call_module"]
    assert targets == ["switching"]
    assert set(program.graphs) == {"", "switching.shared", "switching.inner"}
    assert any("switching" in reason for reason in program.resisted)
    assert _facts(program, "switching.inner.weight") == [("linear", 1, 3)]
    data = torch.randn(3, 16)
    assert torch.equal(program.whole(data), model(data))
    verify(program)


def test_a_layer_with_an_untraceable_forward_of_its_own_is_seen_by_type_with_a_problem() -> None:
    (site,) = capture(nn.Sequential(Opaque(16, 16))).call_sites["0.weight"]
    assert site.rung is Rung.MODULE
    assert "forward of its own" in site.problem
    (site,) = capture(nn.Sequential(Opaque(16, 16)), torch.randn(2, 16)).call_sites["0.weight"]
    assert (site.rung, site.problem) == (Rung.EXPORT, "")


def test_lazy_models_are_not_run() -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 16))
    program = capture(model, torch.randn(2, 8))
    assert isinstance(model[0].weight, nn.UninitializedParameter)
    assert "uninitialised" in program.resisted[0]
    assert program.call_sites["1.weight"][0].rung is Rung.MODULE


def test_heads_of_language_models_are_found_by_data_flow() -> None:
    program = capture(Words(), torch.randint(0, 64, (2, 5)))
    assert program.reads_tokens
    assert program.heads == {"head.weight"}
    assert capture(Tied(), torch.randn(3, 16)).reads_tokens is False
    assert capture(Words()).reads_tokens is None


class Compared(nn.Module):
    """Text and image features in one space, both given back beside their products: no scores of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.text, self.image = nn.Embedding(64, 16), nn.Linear(16, 32), nn.Linear(48, 32)

    def forward(self, words: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        text, seen = self.text(self.words(words).mean(1)), self.image(image)
        return text, seen, (text / text.norm(dim=-1, keepdim=True)) @ seen.t()


def test_features_that_are_compared_are_no_heads_of_language_models() -> None:
    program = capture(Compared(), (torch.randint(0, 64, (2, 5)), torch.randn(3, 48)))
    assert program.reads_tokens
    assert program.heads == frozenset()


def test_compiled_models_are_captured_as_what_is_inside() -> None:
    inner = Tied()
    program = capture(torch.compile(inner), torch.randn(3, 16))  # type: ignore[arg-type]
    assert _facts(program, "_orig_mod.first.weight") == [("linear", 1, 1), ("linear", 1, 1)]
    inner.compile()
    before = inner.__dict__["_compiled_call_impl"]
    assert capture(inner, torch.randn(3, 16)).complete
    assert inner.__dict__["_compiled_call_impl"] is before


def test_capture_is_the_same_for_a_copy() -> None:
    model = Residual()
    data = torch.randn(2, 3, 8, 8)
    assert capture(model, data).call_sites == capture(copy.deepcopy(model), data).call_sites


def test_time_is_linear_in_the_number_of_layers() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(5_000)])
    start = time.perf_counter()
    program = capture(model)
    assert len(program.call_sites) == 5_000
    assert time.perf_counter() - start < 40  # about 4 s; quadratic look-ups took 90 s


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (1, (1,), {}),
        ((1, 2), (1, 2), {}),
        ([1, 2], ([1, 2],), {}),
        ({"a": 1}, (), {"a": 1}),
        (((1,), {"a": 2}), (1,), {"a": 2}),
        (([1, 2],), ([1, 2],), {}),
        ({0: 1}, ({0: 1},), {}),
    ],
)
def test_example_inputs_come_in_all_their_forms(given: Any, args: Any, kwargs: Any) -> None:
    assert split_arguments(given) == (args, kwargs)


def test_inputs_are_described_by_shape_and_dtype() -> None:
    text = describe_arguments((torch.zeros(2, 3), [torch.zeros(1)], 5), {"ids": torch.zeros(4, dtype=torch.int64)})
    assert text == "(float32[2, 3], list[float32[1]], int, ids=int64[4])"


def test_call_sites_read_as_text() -> None:
    assert str(CallSite("a.weight", "linear", "a", Rung.EXPORT)) == "a: linear"
    assert str(CallSite("w", "matmul", "", Rung.TRACED)) == "<root>: matmul"
