"""MaskRuntime.state_dict: a resumed run is the same run, and a state that does not fit changes nothing."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import sparsefx
from sparsefx.errors import StateError
from tests.training import batches, small_net, train


@pytest.mark.parametrize("order", ["model first", "runtime first"])
@pytest.mark.parametrize("pattern", ["2:4", "2:4-transposable", "unstructured", "unstructured:global"])
def test_a_resumed_run_is_the_same_run(order: str, pattern: str) -> None:
    data = batches(12)
    model = sparsefx.sparsify(small_net(), pattern=pattern)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    runtime = sparsefx.attach(model, optimizer, total_steps=12, reset_every=5)
    train(model, optimizer, data[:7])
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "runtime": runtime.state_dict()}, buffer)
    train(model, optimizer, data[7:])

    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    resumed = sparsefx.sparsify(small_net(seed=9), pattern=pattern)
    again = torch.optim.AdamW(resumed.parameters(), 0.01)
    second = sparsefx.attach(resumed, again, total_steps=12, reset_every=5)
    if order == "runtime first":
        second.load_state_dict(state["runtime"])
    resumed.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    if order == "model first":
        second.load_state_dict(state["runtime"])
    assert second.step == 7
    train(resumed, again, data[7:])
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    first_state, second_state = runtime.state_dict(), second.state_dict()
    for name, saved in first_state["parameters"].items():
        assert torch.equal(saved["mask"], second_state["parameters"][name]["mask"])
        assert torch.equal(saved["dormant"], second_state["parameters"][name]["dormant"])


@pytest.mark.parametrize("change", ["version", "algorithm", "missing", "pattern", "shape", "optimizers", "junk"])
def test_a_state_that_does_not_fit_is_refused_whole(change: str) -> None:
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runtime = sparsefx.attach(model, optimizer, total_steps=5)
    train(model, optimizer, batches(2))
    state = runtime.state_dict()
    if change == "version":
        state["version"] = 99
    elif change == "algorithm":
        state["algorithm"] = "static"
    elif change == "missing":
        del state["parameters"]["5.weight"]
    elif change == "pattern":
        state["parameters"]["5.weight"]["pattern"] = "1:4"
    elif change == "shape":
        state["parameters"]["5.weight"]["mask"] = torch.ones(2, 4, dtype=torch.bool)
    elif change == "optimizers":
        state["steps"] = [1, 2]
    else:
        state = {"epoch": 3}
    before = copy.deepcopy((runtime.state_dict(), model.state_dict()))
    with pytest.raises(StateError, match="cannot be loaded"):
        runtime.load_state_dict(state)
    after = (runtime.state_dict(), model.state_dict())
    assert before[0]["steps"] == after[0]["steps"]
    for name in before[0]["parameters"]:
        assert torch.equal(before[0]["parameters"][name]["mask"], after[0]["parameters"][name]["mask"])
    assert all(torch.equal(a, b) for a, b in zip(before[1].values(), after[1].values(), strict=True))


def test_gradual_pruning_goes_on_towards_the_densities_of_the_run_that_was_saved() -> None:
    def build(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, sparsefx.MaskRuntime]:
        model = small_net(seed)
        with torch.no_grad():
            model[5].weight.mul_(1 + seed)
        sparsefx.sparsify(model, pattern="unstructured", density=0.1, algorithm="gradual", densities="global")
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        return model, optimizer, sparsefx.attach(model, optimizer, total_steps=12, rewire_every=2)

    data = batches(12)
    model, optimizer, runtime = build(0)
    train(model, optimizer, data[:5])
    saved = copy.deepcopy((model.state_dict(), runtime.state_dict()))
    train(model, optimizer, data[5:])
    other, again, second = build(4)
    second.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    train(other, again, data[5:])
    for name, mask in sparsefx.masks(model).items():
        assert torch.equal(sparsefx.masks(other)[name], mask), name
    broken = copy.deepcopy(saved[1])
    broken["parameters"]["5.weight"]["target"] = 7.0
    with pytest.raises(StateError, match=r"target 7\.0"):
        second.load_state_dict(broken)
