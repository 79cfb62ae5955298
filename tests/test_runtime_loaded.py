"""Weights loaded into a run that is attached already: what the algorithm keeps beside them begins anew with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from tests.training import batches, loss_of, small_net


def attached(algorithm: str, seed: int, pattern: str = "unstructured") -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sparsefx.sparsify(small_net(seed=seed), pattern=pattern, density=0.1, algorithm=algorithm)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    sparsefx.attach(model, optimizer, total_steps=1000)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach().clone() for name in sparsefx.masks(model)}


@pytest.mark.parametrize("pattern", ["unstructured", "unstructured:global"])
@pytest.mark.parametrize("source", ["dense", "sparse"])
@pytest.mark.parametrize("algorithm", ["top-kast", "deep-r", "dropback"])
def test_a_step_after_loading_is_that_of_a_run_that_began_with_it(algorithm: str, source: str, pattern: str) -> None:
    state = small_net(seed=5).state_dict()
    if source == "sparse":
        state = sparsefx.finalize(sparsefx.sparsify(small_net(seed=5), pattern=pattern, density=0.1)).state_dict()
    fresh = sparsefx.sparsify(small_net(seed=0), pattern=pattern, density=0.1, algorithm=algorithm)
    fresh.load_state_dict(state)
    its_optimizer = torch.optim.SGD(fresh.parameters(), 1e-4)
    sparsefx.attach(fresh, its_optimizer, total_steps=1000)
    model, optimizer = attached(algorithm, 0, pattern)
    model.load_state_dict(state)
    before = weights(model)
    assert all(torch.equal(before[name], weight) for name, weight in weights(fresh).items())
    for each, with_it in ((fresh, its_optimizer), (model, optimizer)):
        step(each, with_it)
    after = weights(model)
    for name, weight in weights(fresh).items():
        assert torch.equal(after[name], weight), name


def test_a_state_saved_before_the_next_step_has_it() -> None:
    model, optimizer = attached("deep-r", 0)
    runtime = sparsefx.attach(model, optimizer, total_steps=1000, replace=True)
    model.load_state_dict(small_net(seed=5).state_dict())
    saved = runtime.state_dict()["parameters"]
    for name, weight in weights(model).items():
        signs = saved[name]["state"]["sign"]
        assert not bool((weight * signs < 0).any()), name


def test_a_runtime_state_that_is_loaded_after_the_weights_stays_as_it_is() -> None:
    model, optimizer = attached("top-kast", 0)
    runtime = sparsefx.attach(model, optimizer, total_steps=1000, replace=True)
    step(model, optimizer)
    saved, state = runtime.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    for one in saved["parameters"].values():
        one["state"]["backward"] = one["mask"].clone()
    other, its_optimizer = attached("top-kast", 7)
    second = sparsefx.attach(other, its_optimizer, total_steps=1000, replace=True)
    other.load_state_dict(state)
    second.load_state_dict(saved)
    step(other, its_optimizer)
    for name, one in second.state_dict()["parameters"].items():
        assert torch.equal(one["state"]["backward"], saved["parameters"][name]["mask"]), name


@pytest.mark.parametrize("algorithm", ["top-kast", "deep-r", "dropback"])
def test_averages_that_are_looked_at_between_steps_leave_what_is_kept(algorithm: str) -> None:
    runs = []
    for looks in (False, True):
        model, optimizer = attached(algorithm, 0)
        runtime = sparsefx.attach(model, optimizer, total_steps=1000, replace=True)
        for _ in range(3):
            step(model, optimizer)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        if looks:
            model.load_state_dict(small_net(seed=5).state_dict())
            model.load_state_dict(state)
        runs.append((weights(model), runtime.state_dict()["parameters"]))
    for name, weight in runs[0][0].items():
        assert torch.equal(weight, runs[1][0][name])
        for key, value in runs[0][1][name]["state"].items():
            assert torch.equal(value, runs[1][1][name]["state"][key]), (name, key)
