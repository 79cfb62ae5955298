"""Methods that change masks while a layer is frozen, an optimizer goes uphill, or what it keeps does not begin at zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.algorithms.drop_grow import _by_neuron
from sparsefx.errors import NonFiniteError
from tests.training import batches, loss_of, small_net, train

MOVING = ("set", "rigl", "sparse-momentum", "dsr", "deep-r")


@pytest.mark.parametrize("algorithm", MOVING)
@pytest.mark.parametrize("pattern", ["unstructured", "unstructured:global"])
def test_a_layer_frozen_on_the_way_stays_as_it_is(algorithm: str, pattern: str) -> None:
    if pattern == "unstructured:global" and algorithm in ("sparse-momentum", "dsr"):
        pattern = "unstructured"
    model = sparsefx.sparsify(small_net(), pattern=pattern, density=0.3, algorithm=algorithm)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    every = {} if algorithm == "deep-r" else {"rewire_every": 2}
    sparsefx.attach(model, optimizer, total_steps=40, **every)
    train(model, optimizer, batches(3))
    frozen, free = model.get_parameter("0.weight"), model.get_parameter("5.weight")
    frozen.requires_grad_(False)
    frozen.grad = None
    before, masks = frozen.detach().clone(), sparsefx.masks(model)
    train(model, optimizer, batches(20, seed=2))
    after = sparsefx.masks(model)
    assert torch.equal(frozen, before)
    assert torch.equal(after["0.weight"], masks["0.weight"])
    assert int(after["5.weight"].sum()) == int(masks["5.weight"].sum())
    if algorithm != "deep-r":  # whose weights hardly ever cross zero in so few steps
        assert not torch.equal(after["5.weight"], masks["5.weight"])
    assert bool(free.requires_grad)


@pytest.mark.parametrize("algorithm", ["sr-ste", "top-kast", "accelerated"])
def test_penalties_are_the_same_whichever_way_the_optimizer_goes(algorithm: str) -> None:
    pattern = "4:8-transposable" if algorithm == "accelerated" else "2:4"
    weights = []
    for maximize in (False, True):
        model = sparsefx.sparsify(small_net(), pattern=pattern, algorithm=algorithm)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, maximize=maximize)
        options = {"penalty": 0.1} if algorithm == "top-kast" else {"decay": 0.1}
        sparsefx.attach(model, optimizer, total_steps=20, rewire_every=3, **options)
        for batch in batches(6):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            (-loss if maximize else loss).backward()
            optimizer.step()
        weights.append(sparsefx.finalize(model).state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.parametrize(
    ("build", "name", "first"), [("Rprop", "step_size", 0.01), ("Adagrad", "sum", 0.5), ("Adam", "exp_avg_sq", 0.0)]
)
def test_what_the_optimizer_keeps_of_new_weights_is_what_it_begins_with(build: str, name: str, first: float) -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.3, algorithm="set")
    options = {"initial_accumulator_value": 0.5} if build == "Adagrad" else {}
    optimizer = getattr(torch.optim, build)(model.parameters(), 0.01, **options)
    sparsefx.attach(model, optimizer, total_steps=20, rewire_every=4)
    train(model, optimizer, batches(3))
    before = sparsefx.masks(model)["5.weight"]
    train(model, optimizer, batches(1, seed=3))
    grown = sparsefx.masks(model)["5.weight"] & ~before
    assert grown.any()
    kept = optimizer.state[model.get_parameter("5.weight")][name]
    assert torch.equal(kept[grown], torch.full_like(kept[grown], first))
    values = model.get_parameter("5.weight").detach().clone()
    train(model, optimizer, batches(1, seed=4))
    moved = (model.get_parameter("5.weight").detach() - values)[grown & sparsefx.masks(model)["5.weight"]]
    assert float(moved.abs().max()) > 1e-4


@pytest.mark.parametrize("algorithm", ["deep-r", "rigl"])
def test_no_number_in_a_gradient_is_told(algorithm: str) -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.3, algorithm=algorithm)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    sparsefx.attach(model, optimizer, total_steps=20, **({"rewire_every": 1} if algorithm == "rigl" else {}))
    masks = sparsefx.masks(model)
    loss_of(model, batches(1)[0]).backward()
    gradient = model.get_parameter("5.weight").grad
    assert gradient is not None
    gradient.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"5\.weight"):
        optimizer.step()
    assert torch.equal(sparsefx.masks(model)["5.weight"], masks["5.weight"])


def test_momentum_of_half_precision_is_a_number() -> None:
    model = sparsefx.sparsify(small_net().half(), pattern="unstructured", density=0.3, algorithm="sparse-momentum")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-4)
    runtime = sparsefx.attach(model, optimizer, total_steps=20, rewire_every=4)
    layer = runtime._hooks[0].run.layers[1]
    optimizer.state[layer.parameter] = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.zeros_like(layer.weight),
        "exp_avg_sq": torch.zeros_like(layer.weight),
    }
    assert torch.equal(layer.momentum, torch.zeros_like(layer.momentum))


def test_the_ramp_goes_by_the_model_whatever_order_the_optimizer_has() -> None:
    changed = []
    for order in ((0, 1, 2), (2, 0, 1)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
        sparsefx.sparsify(model, pattern="unstructured", density=0.3, algorithm="set")
        optimizer = torch.optim.SGD([{"params": list(model[index].parameters())} for index in order], 0.05)
        sparsefx.attach(model, optimizer, total_steps=20, rewire_every=2, depth_ramp=0.0)
        before = sparsefx.masks(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 32)).square().mean().backward()
            optimizer.step()
        after = sparsefx.masks(model)
        changed.append([int((before[name] ^ after[name]).sum()) for name in before])
    assert changed[0] == changed[1]
    assert changed[0][0] == 0
    assert changed[0][2] > changed[0][1] > 0


def test_neurons_of_a_stack_are_the_outputs_of_each_matrix() -> None:
    scores = torch.zeros(2, 3, 4)
    scores[0, 1] = 3.0
    scores[1, 2] = 1.0
    chosen = _by_neuron(scores, torch.ones(2, 3, 4, dtype=torch.bool), 4, 2)
    assert chosen.sum(2).tolist() == [[0, 3, 0], [0, 0, 1]]


def test_masks_that_would_never_move_are_warned_of() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.3, algorithm="rigl")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with pytest.warns(UserWarning, match="every 100 steps, but the run has 80"):
        runtime = sparsefx.attach(model, optimizer, total_steps=80)
    runtime.detach()
    sparsefx.attach(model, optimizer, total_steps=80, rewire_every=20)
