"""Kinds of broken models, optimizers, options and schedules that `attach` and training are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from tests.hostile import net, refused, sgd


def _one(weight: Tensor) -> nn.Module:
    """A model whose only weight is this one."""
    model = nn.Sequential(nn.Linear(32, 64, bias=False))
    model[0].weight = nn.Parameter(weight, requires_grad=weight.is_floating_point() and weight.dtype.itemsize > 1)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(64)), "uninitialised"),
    "whole numbers": (lambda: _one(torch.ones(64, 32, dtype=torch.int8)), "quantised or integer"),
    "truth values": (lambda: _one(torch.ones(64, 32, dtype=torch.bool)), "quantised or integer"),
    "complex": (lambda: _one(torch.ones(64, 32, dtype=torch.complex64)), "complex"),
    "eight bits": (lambda: _one(torch.ones(64, 32).to(torch.float8_e4m3fn)), "format for storage"),
    "sparse layout": (lambda: _one(torch.ones(64, 32).to_sparse()), "layout"),
    "no elements": (lambda: nn.Sequential(nn.Linear(32, 0)), "no elements"),
    "compiled by TorchScript": (lambda: torch.jit.script(net()), "no Linear or Conv"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_sparse(kind: str) -> None:
    build, told = MODELS[kind]
    model = build()
    things = [] if kind in ("lazy", "compiled by TorchScript") else [model]
    refused(lambda: sparsefx.sparsify(model), told, *things)


@pytest.mark.parametrize("given", [None, "resnet50", nn.Linear, {"weight": 1}, 3], ids=range(5))
@pytest.mark.parametrize("function", [sparsefx.sparsify, sparsefx.finalize, sparsefx.audit, sparsefx.masks])
def test_something_that_is_no_model(function: Any, given: Any) -> None:
    refused(lambda: function(given), "expected a torch.nn.Module")


def _replaced(model: nn.Module) -> None:
    model.get_submodule("0").weight = nn.Parameter(torch.zeros(8, 32))


def _eight_bits(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.float8_e4m3fn)


def _integers(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(torch.int32)


@pytest.mark.parametrize(("change", "told"), [(_replaced, "was replaced"), (_eight_bits, "float8"), (_integers, "int32")])
def test_weights_that_were_changed_under_their_masks(change: Callable[[nn.Module], None], told: str) -> None:
    model = sparsefx.sparsify(net())
    change(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    refused(lambda: sparsefx.attach(model, optimizer, total_steps=50), told, model, optimizer)
    refused(lambda: sparsefx.finalize(model), told, model)


def test_a_weight_that_changes_its_shape_during_training() -> None:
    model = sparsefx.sparsify(net())
    optimizer = sgd(model)
    sparsefx.attach(model, optimizer, total_steps=50)
    model[0].weight.data, model[0].bias.data = torch.zeros(8, 32), torch.zeros(8)
    refused(optimizer.step, "was replaced", model, optimizer)


OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "none": (lambda model: None, "expected a torch.optim.Optimizer"),
    "a text": (lambda model: "adamw", "expected a torch.optim.Optimizer"),
    "a class": (lambda model: torch.optim.SGD, "the class SGD"),
    "a dict": (lambda model: {"lr": 1}, "expected a torch.optim.Optimizer"),
    "the model": (lambda model: model, "expected a torch.optim.Optimizer"),
    "parameters": (lambda model: list(model.parameters()), "expected a torch.optim.Optimizer"),
    "a generator of optimizers": (lambda model: (sgd(model) for _ in range(1)), "expected a torch.optim.Optimizer"),
    "a learning rate schedule": (lambda model: torch.optim.lr_scheduler.StepLR(sgd(model), 1), "optimizer inside"),
    "a gradient scaler": (lambda model: torch.amp.GradScaler("cpu"), "expected a torch.optim.Optimizer"),
    "one of clones": (lambda model: torch.optim.SGD([p.detach().clone() for p in model.parameters()], 0.1), "holds none"),
    "one of another model": (lambda model: sgd(net()), "holds none"),
    "one twice": (lambda model: [sgd(model)] * 2, "two of the optimizers"),
    "two of one weight": (lambda model: [sgd(model), sgd(model)], "two of the optimizers"),
    "a list with none in it": (lambda model: [sgd(model), None], "expected a torch.optim.Optimizer"),
    "an empty list": (lambda model: [], "no optimizer"),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore")
def test_a_broken_optimizer(kind: str) -> None:
    build, told = OPTIMIZERS[kind]
    model = sparsefx.sparsify(net())
    given = build(model)
    refused(lambda: sparsefx.attach(model, given, total_steps=50), told, model)


NAN = float("nan")
OPTIONS: list[tuple[dict[str, Any], str]] = [
    *(({"total_steps": value}, "total_steps=.*whole number") for value in (0, -1, 1.5, "9", None, True, NAN)),
    *(({"rewire_every": value}, "rewire_every=.*whole number") for value in (0, 2.5, "x")),
    *(({"scale": value}, "scale=.*from 0 to 1") for value in (-1, NAN, "x", 2)),
    *(({"exploit": value}, "exploit=.*expected one of") for value in ("resett", 3)),
    *(({"exploit": "regularize", "decay": value}, "decay=.*from 0 to 1") for value in (-1, 2.0, NAN)),
    ({"exploit": "fix", "fix_after": 1.5}, "fix_after=1.5"),
    ({"fix_after": 0.5}, "only acts with exploit='fix'"),
    ({"exploit": "fix", "reset_every": 3}, "only acts with exploit='reset'"),
    *(({"steps_per_epoch": value}, "steps_per_epoch=.*whole number") for value in (0, 1.5)),
    *(({"generator": value}, "generator=.*torch.Generator") for value in (42, "cpu")),
    ({"check_every": 0}, "check_every=0"),
    ({"rewire_evry": 3}, "did you mean 'rewire_every'"),
]


@pytest.mark.parametrize(("options", "told"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_a_broken_option_of_attach(options: dict[str, Any], told: str) -> None:
    model = sparsefx.sparsify(net())
    optimizer = sgd(model)
    refused(lambda: sparsefx.attach(model, optimizer, **{"total_steps": 50, **options}), told, model, optimizer)
    sparsefx.attach(model, optimizer, total_steps=50)


def _fails(step: int) -> float:
    raise ZeroDivisionError("no such step")


SCHEDULES: dict[str, tuple[Any, str]] = {
    "a number": (0.5, "function of the step"),
    "a text": ("cubic", "function of the step"),
    "nothing": (lambda step: None, "returned None"),
    "not a number": (lambda step: NAN, "nan"),
    "zero": (lambda step: 0.0, r"\(0, 1\]"),
    "more than all": (lambda step: 2, r"\(0, 1\]"),
    "texts": (lambda step: "half", "half"),
    "vectors": (lambda step: torch.tensor([0.5, 0.5]), "tensor"),
    "complex numbers": (lambda step: 0.5j, "0.5j"),
    "two arguments": (lambda step, total: 0.5, "takes the step alone"),
    "one that fails": (_fails, "no such step"),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_broken_schedule(kind: str) -> None:
    schedule, told = SCHEDULES[kind]
    model = sparsefx.sparsify(net(), pattern="unstructured")
    optimizer = sgd(model)
    refused(lambda: sparsefx.attach(model, optimizer, total_steps=50, density_schedule=schedule), told, model, optimizer)


def test_a_schedule_that_fails_later_stops_the_step_before_weights_change() -> None:
    model = sparsefx.sparsify(net(), pattern="unstructured")
    optimizer = sgd(model)
    sparsefx.attach(model, optimizer, total_steps=50, density_schedule=lambda step: _fails(step) if step == 2 else 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    refused(optimizer.step, "step 2 and raised ZeroDivisionError", model, optimizer)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: sparsefx.schedules.constant("half"), "half"),
        (lambda: sparsefx.schedules.constant(0), r"\(0, 1\]"),
        (lambda: sparsefx.schedules.cubic(NAN, 0.1, first_step=0, last_step=5), "nan"),
        (lambda: sparsefx.schedules.cosine(1, 0, first_step=9, last_step=5), "first_step < last_step"),
        (lambda: sparsefx.schedules.linear(1, -3, last_step=5), "from 0 to 1"),
    ],
    ids=range(5),
)
def test_a_schedule_that_cannot_be(build: Callable[[], Any], told: str) -> None:
    refused(build, told)
