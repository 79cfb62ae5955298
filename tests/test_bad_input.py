"""Bad input: a clear SparsefxError each time, and the model as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.errors import (
    CaptureError,
    EligibilityError,
    NonFiniteError,
    OptionError,
    PatternError,
    SparsefxError,
    StateError,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 16))


def snapshot(model: nn.Module) -> Any:
    modules = {
        name: {k: v for k, v in module.__dict__.items() if not k.startswith("_")} for name, module in model.named_modules()
    }
    hooks = {name: [len(v) for k, v in module.__dict__.items() if k.endswith("hooks")] for name, module in model.named_modules()}
    return copy.deepcopy(model.state_dict()), modules, hooks, [id(p) for p in model.parameters()], torch.get_rng_state()


def assert_unchanged(model: nn.Module, before: Any) -> None:
    now = snapshot(model)
    for name, value in before[0].items():
        assert torch.equal(value, now[0][name]) or bool(value.isnan().any()), name
    assert before[1:4] == now[1:4]
    assert torch.equal(before[4], now[4])
    assert not any("_sparsefx" in key for module in model.modules() for key in module.__dict__)


CASES: list[tuple[str, dict[str, Any], type[SparsefxError], str]] = [
    ("unknown pattern", {"pattern": "2:5:7"}, PatternError, "2:5:7"),
    ("impossible N:M", {"pattern": "5:4"}, PatternError, "5:4"),
    ("unknown algorithm", {"algorithm": "magnitud"}, OptionError, "did you mean 'magnitude'"),
    ("density 0", {"pattern": "unstructured", "density": 0}, PatternError, r"\(0, 1\]"),
    ("density above 1", {"pattern": "unstructured", "density": 1.5}, PatternError, r"\(0, 1\]"),
    ("density NaN", {"pattern": "unstructured", "density": float("nan")}, PatternError, r"\(0, 1\]"),
    ("density as text", {"pattern": "unstructured", "density": "half"}, PatternError, r"\(0, 1\]"),
    ("density for 2:4", {"density": 0.25}, PatternError, "always 0.5"),
    ("wrong rank of input", {"example_inputs": (torch.zeros(3),)}, CaptureError, r"3"),
    ("wrong channels of input", {"example_inputs": (torch.zeros(1, 7, 6, 6),)}, CaptureError, r"1, 7, 6, 6|\[1, 7, 6, 6\]"),
    ("too many inputs", {"example_inputs": (torch.zeros(1, 16, 6, 6), torch.zeros(1))}, CaptureError, "argument"),
    ("include nothing", {"include": "decoder.*"}, EligibilityError, "decoder"),
    ("exclude nothing", {"exclude": "lm_head"}, EligibilityError, "lm_head"),
    ("everything excluded", {"exclude": (nn.Conv2d, nn.Linear)}, EligibilityError, "no layer"),
]


@pytest.mark.parametrize(("options", "error", "text"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_sparsify_refuses(options: dict[str, Any], error: type[SparsefxError], text: str) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        sparsefx.sparsify(model, **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = net()
    with torch.no_grad():
        model[4].weight[2, 3] = value
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match="4"):
        sparsefx.sparsify(model)
    assert_unchanged(model, before)


def test_no_eligible_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(6, 10))
    before = snapshot(model)
    with pytest.raises(EligibilityError, match=r"multiple of 16"):
        sparsefx.sparsify(model)
    assert_unchanged(model, before)


def test_a_model_without_layers() -> None:
    with pytest.raises(EligibilityError, match="no Linear or Conv"):
        sparsefx.sparsify(nn.Sequential(nn.ReLU()))


def test_sparsify_twice() -> None:
    model = sparsefx.sparsify(net())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match="already"):
        sparsefx.sparsify(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert sparsefx.masks(model)


@pytest.mark.parametrize("function", ["sparsify", "masks", "finalize", "audit", "graph"])
def test_something_that_is_no_module(function: str) -> None:
    with pytest.raises(OptionError, match=r"expected a torch\.nn\.Module"):
        getattr(sparsefx, function)("resnet50")


@pytest.mark.parametrize("function", ["finalize", "graph"])
def test_a_model_that_is_not_sparsified(function: str) -> None:
    with pytest.raises(StateError, match="not sparsified"):
        getattr(sparsefx, function)(net())


def test_attach_to_a_model_that_is_not_sparsified() -> None:
    model = net()
    with pytest.raises(StateError, match="not sparsified"):
        sparsefx.attach(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=5)


def test_attach_without_optimizer() -> None:
    with pytest.raises(OptionError, match="no optimizer"):
        sparsefx.attach(sparsefx.sparsify(net()), [], total_steps=5)


def test_a_density_schedule_for_a_fixed_density() -> None:
    model = sparsefx.sparsify(net())
    with pytest.raises(OptionError, match=r"always 0\.5"):
        sparsefx.attach(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            total_steps=5,
            density_schedule=sparsefx.schedules.constant(0.3),
        )


def test_a_failing_attach_leaves_the_optimizer_as_it_was() -> None:
    model = sparsefx.sparsify(net())
    mine, other = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(net().parameters(), 0.1)
    with pytest.raises(SparsefxError):
        sparsefx.attach(model, [mine, other], total_steps=5)
    assert not mine._optimizer_step_pre_hooks
    assert not mine._optimizer_step_post_hooks
    sparsefx.attach(model, mine, total_steps=5)


def test_finalize_of_a_weight_that_became_nan_changes_nothing() -> None:
    model = sparsefx.sparsify(net())
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"4\.weight"):
        sparsefx.finalize(model)
    assert len(sparsefx.masks(model)) == 2
