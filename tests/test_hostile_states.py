"""Kinds of broken runtime states, files and arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsefx
from tests.hostile import net, refused, sgd

NAN = float("nan")
X = torch.ones(4, 32)


def _whole(**change: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, **change}


def _parameter(**change: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {
        **state,
        "parameters": {**state["parameters"], "0.weight": {**state["parameters"]["0.weight"], **change}},
    }


def _ones(**options: Any) -> Tensor:
    return torch.ones(64, 32, **options)


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "nothing": (lambda state: None, "version"),
    "a list": (lambda state: [state], "version"),
    "an empty dict": (lambda state: {}, "version"),
    "another version": (_whole(version=99), "version 99"),
    "another algorithm": (_whole(algorithm="set"), "algorithm 'set'"),
    "more optimizers": (_whole(steps=[1, 1], values=[{}, {}]), "2 optimizers"),
    "steps below zero": (_whole(steps=[-1]), "damaged"),
    "half steps": (_whole(steps=[1.5]), "damaged"),
    "true steps": (_whole(steps=[True]), "damaged"),
    "a tensor of steps": (_whole(steps=torch.tensor([1])), "damaged"),
    "no values": (_whole(values=None), "damaged"),
    "values that are texts": (_whole(values=[{"a": "b"}]), "damaged"),
    "no generator": (_whole(generator=None), "damaged"),
    "a short generator": (_whole(generator=torch.zeros(3, dtype=torch.uint8)), "damaged"),
    "a generator of noise": (_whole(generator=torch.full_like(torch.Generator().get_state(), 255)), "generator's state"),
    "a list of parameters": (_whole(parameters=[1]), "damaged"),
    "no parameters": (_whole(parameters={}), "0 masked parameters"),
    "a float mask": (_parameter(mask=_ones()), "another mask"),
    "a mask of another shape": (_parameter(mask=_ones(dtype=torch.bool).t()), "another mask"),
    "a mask without values": (_parameter(mask=_ones(dtype=torch.bool, device="meta")), "another mask"),
    "no mask": (_parameter(mask=None), "another mask"),
    "a mask that is not 2:4": (_parameter(mask=_ones(dtype=torch.bool)), "not 2:4"),
    "no dormant values": (_parameter(dormant=None), "dormant"),
    "dormant texts": (_parameter(dormant="x"), "dormant"),
    "dormant complex numbers": (_parameter(dormant=_ones(dtype=torch.complex64)), "dormant"),
    "dormant whole numbers": (_parameter(dormant=_ones(dtype=torch.int32)), "dormant"),
    "dormant values of sparse layout": (_parameter(dormant=_ones().to_sparse()), "dormant"),
    "dormant values without values": (_parameter(dormant=_ones(device="meta")), "dormant"),
    "dormant NaN": (_parameter(dormant=_ones() * NAN), "NaN or infinity in 0.weight"),
    "another pattern": (_parameter(pattern="4:8"), "pattern '4:8'"),
    "no density": (_parameter(density=None), "density None"),
    "a density that is NaN": (_parameter(density=NAN), "density nan"),
    "other tensors of the algorithm": (_parameter(state={"a": torch.zeros(1)}), "values of the algorithm"),
    "no dict of such": (_parameter(state=None), "damaged"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_broken_state_of_the_runtime(kind: str) -> None:
    change, told = STATES[kind]
    model = sparsefx.sparsify(net())
    optimizer = sgd(model)
    runtime = sparsefx.attach(model, optimizer, total_steps=50)
    state = copy.deepcopy(runtime.state_dict())
    refused(lambda: runtime.load_state_dict(change(state)), told, model, optimizer)
    runtime.load_state_dict(state)


def _other_runtime() -> sparsefx.MaskRuntime:
    model = sparsefx.sparsify(net())
    return sparsefx.attach(model, sgd(model), total_steps=50)


def _circle() -> dict[str, Any]:
    extra: dict[str, Any] = {}
    extra["itself"] = extra
    return extra


SAVES: dict[str, tuple[dict[str, Any], str]] = {
    "no path": ({"path": None}, "path=None"),
    "no folder": ({"path": "no/such/folder/model"}, "does not exist"),
    "a folder": ({"path": ""}, "directory"),
    "a list of extras": ({"extra": [1]}, "extra=list"),
    "extras with numbers as keys": ({"extra": {1: 2}}, "texts as keys"),
    "an object": ({"extra": {"a": object()}}, "object"),
    "a dict that holds itself": ({"extra": _circle()}, "contains itself"),
    "a text as runtime": ({"runtime": "r"}, "runtime=str"),
}


@pytest.mark.parametrize("kind", SAVES)
def test_what_cannot_be_saved(kind: str, tmp_path: Path) -> None:
    given, told = SAVES[kind]
    model = sparsefx.sparsify(net())
    sparsefx.save(model, tmp_path / "model")
    options = {"path": "model", **given}
    path = options.pop("path")
    place = None if path is None else f"{tmp_path}/{path}"
    refused(lambda: sparsefx.save(model, place, **options), told, model, folder=tmp_path)  # type: ignore[arg-type]


def test_a_runtime_of_another_model_is_neither_saved_nor_loaded(tmp_path: Path) -> None:
    model, runtime = sparsefx.sparsify(net()), _other_runtime()
    sparsefx.save(model, tmp_path / "model")
    refused(lambda: sparsefx.save(model, tmp_path / "model", runtime=runtime), "follows another model", model, folder=tmp_path)
    refused(lambda: sparsefx.load(model, tmp_path / "model", runtime=runtime), "follows another model", model, folder=tmp_path)


def _loss(model: Any, batch: Tensor) -> Tensor:
    found: Tensor = model(batch).sum()
    return found


def _divides(*given: Any) -> Any:
    raise ZeroDivisionError("by zero")


SNIP: dict[str, Any] = {"algorithm": "snip", "calibration": [X], "loss_fn": _loss}
ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no pattern": ({"pattern": None}, "pattern=None"),
    "a number as pattern": ({"pattern": 3}, "pattern=3"),
    "a class as pattern": ({"pattern": sparsefx.patterns.Pattern}, "pattern=<class"),
    "no text in a pattern": ({"pattern": ""}, "unknown pattern ''"),
    "4:2": ({"pattern": "4:2"}, "4:2"),
    "blocks without sides": ({"pattern": "block:0x4"}, "0x4"),
    "density true": ({"pattern": "unstructured", "density": True}, "density True"),
    "density infinite": ({"pattern": "unstructured", "density": float("inf")}, "density inf"),
    "a number to include": ({"include": 5}, "include was given 5"),
    "a number to exclude": ({"exclude": [3]}, "exclude was given 3"),
    "a predicate that fails": ({"include": _divides}, "raised ZeroDivisionError"),
    "a predicate of one argument": ({"exclude": lambda name: True}, "raised TypeError"),
    "a predicate that says nothing": ({"include": lambda name, module: None}, "not among the included"),
    "a text as rule": ({"eligibility": "paper"}, "eligibility='paper'"),
    "densities misspelt": ({"pattern": "unstructured", "densities": "erkk"}, "did you mean 'erk'"),
    "densities of no layer": ({"pattern": "unstructured", "densities": {"no": 0.5}}, "names 'no'"),
    "a density of 2": ({"pattern": "unstructured", "densities": {"0": 2.0}}, "density 2.0"),
    "a list of densities": ({"pattern": "unstructured", "densities": [0.5]}, r"densities=\[0.5\]"),
    "densities of a fixed pattern": ({"densities": "erk"}, "always 0.5"),
    "no algorithm": ({"algorithm": None}, "algorithm None"),
    "a class as algorithm": ({"algorithm": sparsefx.algorithms.RigL}, "RigL"),
    "an algorithm the pattern refuses": ({"pattern": "channel", "algorithm": "sparse-momentum"}, "cannot be used with"),
    "a seed as generator": ({"generator": 4}, "generator=4"),
    "no batches": ({"algorithm": "snip"}, "no calibration and loss_fn"),
    "an empty list of batches": ({**SNIP, "calibration": []}, "without any batch"),
    "a number of batches": ({**SNIP, "calibration": 3}, "calibration=int"),
    "one batch that is not in a list": ({**SNIP, "calibration": X}, "calibration=Tensor"),
    "a text as loss": ({**SNIP, "loss_fn": "mse"}, "loss_fn='mse'"),
    "a loss that fails": ({**SNIP, "loss_fn": _divides}, "raised ZeroDivisionError"),
    "a loss with dimensions": ({**SNIP, "loss_fn": lambda model, batch: model(batch)}, "shape"),
    "a loss that is a number": ({**SNIP, "loss_fn": lambda model, batch: 3.0}, "a float"),
    "a loss that is NaN": ({**SNIP, "loss_fn": lambda model, batch: _loss(model, batch) * NAN}, "NaN"),
    "a loss without gradient": ({**SNIP, "loss_fn": lambda model, batch: _loss(model, batch).detach()}, "no gradient"),
    "Wanda without batches": ({"algorithm": "wanda"}, "calibration=NoneType"),
    "Wanda with NaN": ({"algorithm": "wanda", "calibration": [X * NAN]}, "NaN"),
    "Wanda with a text": ({"algorithm": "wanda", "calibration": ["a"]}, "does not run"),
    "inputs of another shape": ({"example_inputs": torch.zeros(3, 5)}, "3, 5"),
    "inputs of another name": ({"example_inputs": {"no": X}}, "no="),
    "inputs without values": ({"example_inputs": X.to("meta")}, "meta"),
    "inputs that are an object": ({"example_inputs": object()}, "object"),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_a_broken_argument_of_sparsify(kind: str) -> None:
    given, told = ARGUMENTS[kind]
    model = net()
    optimizer = sgd(model)
    refused(lambda: sparsefx.sparsify(model, **given), told, model, optimizer)


CALLS: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "a page without path": (lambda model, folder: sparsefx.audit(model).to_html(None), "path=None"),  # type: ignore[arg-type]
    "a page over a folder": (lambda model, folder: sparsefx.audit(model).to_html(folder), "cannot be written"),
    "ONNX without path": (lambda model, folder: sparsefx.export_onnx(model, (X,), None), "path=None"),  # type: ignore[arg-type]
    "ONNX of old": (lambda model, folder: sparsefx.export_onnx(model, (X,), folder / "m", opset=3), "opset 3"),
    "ONNX of other inputs": (lambda model, folder: sparsefx.export_onnx(model, (X[:, :3],), folder / "m"), "does not run"),
    "a folder that is none": (lambda model, folder: sparsefx.export_onnx(model, (X,), folder / "no/m"), "does not exist"),
    "an encoding": (
        lambda model, folder: sparsefx.export_onnx(model, (X,), folder / "m", weights="zip"),  # type: ignore[arg-type]
        "weights='zip'",
    ),
    "no file to audit": (lambda model, folder: sparsefx.audit_onnx(folder / "no"), "no such file"),
    "a foreign file to audit": (lambda model, folder: sparsefx.audit_onnx(folder / "text"), "not an ONNX file"),
    "a foreign plan": (lambda model, folder: sparsefx.ChannelPlan.load(folder / "text"), "no channel plan"),
    "channels in no multiple": (lambda model, folder: sparsefx.prune_channels(model, X, multiple=0), "multiple=0"),
    "a text to permute": (lambda model, folder: sparsefx.search_permutation("w", seconds=1), "a str"),  # type: ignore[arg-type]
    "a vector to permute": (lambda model, folder: sparsefx.search_permutation(X[0], seconds=1), "its axes"),
    "a lottery without training": (
        lambda model, folder: sparsefx.lottery_ticket(model, 3, total_steps=5, density=0.5),  # type: ignore[arg-type]
        "train=3",
    ),
    "a lottery of too many": (
        lambda model, folder: sparsefx.lottery_ticket(model, lambda *given: None, total_steps=5, density=7),
        "density 7",
    ),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_broken_call(kind: str, tmp_path: Path) -> None:
    call, told = CALLS[kind]
    (tmp_path / "text").write_text("no model")
    model = net()
    refused(lambda: call(model, tmp_path), told, model, folder=tmp_path)
