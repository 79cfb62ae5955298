"""Sparse momentum, SET and RigL against their rules, written out for one change of masks with sorts and loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.algorithms import Algorithm, RigL, SparseEvolution, SparseMomentum
from sparsefx.errors import OptimizerError, OptionError
from tests.training import batches, loss_of, small_net, train

LAYERS = ("0.weight", "5.weight")


def smallest(values: Tensor, among: Tensor, count: int) -> Tensor:
    """The ``count`` smallest; of equal ones the last in row-major order go first."""
    places = [(float(values.flatten()[i]), -i) for i in among.flatten().nonzero().flatten().tolist()]
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    for _, place in sorted(places)[:count]:
        chosen[-place] = True
    return chosen.view(values.shape)


def largest(values: Tensor, among: Tensor, count: int) -> Tensor:
    """The ``count`` largest; of equal ones the first in row-major order."""
    places = [(-float(values.flatten()[i]), i) for i in among.flatten().nonzero().flatten().tolist()]
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    for _, place in sorted(places)[:count]:
        chosen[place] = True
    return chosen.view(values.shape)


class Watched:
    """A model trained up to a step that changes masks, and what it was before that change."""

    def __init__(self, algorithm: Algorithm, optimizer: str = "momentum", density: float = 0.2, **options: Any) -> None:
        self.model = sparsefx.sparsify(small_net(), pattern="unstructured", density=density, algorithm=algorithm)
        parameters = self.model.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, 0.05, momentum=0.9) if optimizer == "momentum" else torch.optim.AdamW(parameters, 0.01)
        )
        self.runtime = sparsefx.attach(self.model, self.optimizer, total_steps=40, rewire_every=4, **options)
        train(self.model, self.optimizer, batches(3))
        self.before = sparsefx.masks(self.model)
        self.data = batches(4)[3]

    def change(self) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, self.data).backward()
        self.gradients = {name: self.model.get_parameter(name).grad.clone() for name in LAYERS}
        self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.optimizer.step()
        self.after = sparsefx.masks(self.model)


def cosine(first: float, last: float, step: int, end: int) -> float:
    import math

    return last + (first - last) * (1 + math.cos(math.pi * step / end)) / 2


def test_rigl_drops_small_weights_grows_large_gradients_and_makes_no_step() -> None:
    run = Watched(RigL())
    run.change()
    fraction = cosine(0.3, 0.0, 4, 30)
    for name in LAYERS:
        weight, old = run.weights[name], run.before[name]
        count = round(fraction * int(old.sum()))
        assert count > 0
        kept = old & ~smallest(weight.abs(), old, count)
        wanted = kept | largest(run.gradients[name].abs(), ~kept, count)
        assert torch.equal(run.after[name], wanted)
        assert torch.equal(run.model.get_parameter(name).detach(), weight * (wanted & old)), "what is grown back keeps its value"
        grown = wanted & ~old
        assert bool(grown.any())
        assert not run.optimizer.state[run.model.get_parameter(name)]["momentum_buffer"][grown].any()
        assert torch.equal(run.model.get_parameter(name).grad, run.gradients[name]), "the user's gradients are there again"
    for name, value in run.model.state_dict().items():
        if name not in LAYERS:
            assert torch.equal(value, run.weights[name]), "the change takes the step's place for every parameter"


def test_rigl_stops_after_three_quarters() -> None:
    run = Watched(RigL())
    for number in range(4, 41):
        run.change()
        moved = any(not torch.equal(run.before[name], run.after[name]) for name in LAYERS)
        assert moved == (number % 4 == 0 and number < 30), number
        run.before = run.after


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("redistribution", ["momentum", "magnitude", "nonzero", "none"])
def test_sparse_momentum_shares_what_was_dropped_and_grows_by_momentum(redistribution: Any, optimizer: str) -> None:
    run = Watched(SparseMomentum(redistribution=redistribution), optimizer)
    twin = Watched(SparseMomentum(redistribution=redistribution), optimizer, fix_after=0.0)
    run.change()
    twin.change()  # the same step without the change of masks
    fraction = cosine(0.5, 0.005, 4, 40)
    kept, momentum, shares, dropped = {}, {}, {}, {}
    for name in LAYERS:
        weight, old = twin.model.get_parameter(name).detach(), run.before[name]
        state = twin.optimizer.state[twin.model.get_parameter(name)]
        momentum[name] = (
            state["momentum_buffer"] if optimizer == "momentum" else state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
        ).abs()
        dropped[name] = round(fraction * int(old.sum()))
        kept[name] = old & ~smallest(weight.abs(), old, dropped[name])
        mean = {"momentum": momentum[name], "magnitude": weight.abs()}.get(redistribution)
        shares[name] = float(mean[old].double().mean()) if mean is not None else float(kept[name].sum())
    total = sum(dropped.values())
    ideal = {name: total * shares[name] / sum(shares.values()) for name in LAYERS}
    counts = dropped if redistribution == "none" else {name: round(value) for name, value in ideal.items()}
    assert sum(counts.values()) == total
    for name in LAYERS:
        assert torch.equal(run.after[name], kept[name] | largest(momentum[name], ~kept[name], counts[name])), name
        assert torch.equal(
            run.model.get_parameter(name).detach(),
            twin.model.get_parameter(name).detach() * (run.after[name] & run.before[name]),
        )
    assert sum(int(mask.sum()) for mask in run.after.values()) == sum(int(mask.sum()) for mask in run.before.values())


def test_growth_by_neuron_gives_each_its_share() -> None:
    run = Watched(SparseMomentum(growth="neuron", redistribution="none"))
    run.change()
    buffer = run.optimizer.state[run.model.get_parameter("5.weight")]["momentum_buffer"].abs()
    old, new = run.before["5.weight"], run.after["5.weight"]
    gained = (new & ~old).sum(1)
    assert int(new.sum()) == int(old.sum())
    assert torch.corrcoef(torch.stack([gained.float(), buffer.mean(1)]))[0, 1] > 0.5


def test_global_growth_and_drop_rank_all_layers_together() -> None:
    run = Watched(SparseMomentum(growth="global", drop="global"))
    twin = Watched(SparseMomentum(growth="global", drop="global"), fix_after=0.0)
    run.change()
    twin.change()
    parameters = {name: twin.model.get_parameter(name) for name in LAYERS}
    weights = torch.cat([parameters[name].detach().flatten() for name in LAYERS])
    momentum = torch.cat([twin.optimizer.state[parameters[name]]["momentum_buffer"].flatten() for name in LAYERS])
    old = torch.cat([run.before[name].flatten() for name in LAYERS])
    count = sum(round(cosine(0.5, 0.005, 4, 40) * int(run.before[name].sum())) for name in LAYERS)
    kept = old & ~smallest(weights.abs(), old, count)
    wanted = kept | largest(momentum.abs(), ~kept, count)
    assert torch.equal(torch.cat([run.after[name].flatten() for name in LAYERS]), wanted)


def test_growth_does_not_draw_the_numbers_of_the_first_masks_again() -> None:
    for seed in (None, 5):
        model = sparsefx.sparsify(
            small_net(),
            pattern="unstructured",
            density=0.2,
            algorithm="set",
            generator=None if seed is None else torch.Generator().manual_seed(seed),
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        sparsefx.attach(model, optimizer, total_steps=9, rewire_every=1, generator=generator)
        before = sparsefx.masks(model)
        train(model, optimizer, batches(1))
        for name, mask in sparsefx.masks(model).items():
            assert int((before[name] & ~mask).sum()) > 0.1 * int(mask.sum())


def test_the_ramp_changes_early_layers_less() -> None:
    run = Watched(SparseMomentum(redistribution="none", depth_ramp=0.0, growth="random"))
    run.change()
    assert torch.equal(run.before["0.weight"], run.after["0.weight"])
    assert not torch.equal(run.before["5.weight"], run.after["5.weight"])


@pytest.mark.parametrize("drop", ["magnitude", "set"])
def test_set_drops_the_smallest_and_with_its_first_rule_as_many_of_each_sign(drop: Any) -> None:
    run = Watched(SparseEvolution(drop=drop, drop_schedule="constant"))
    twin = Watched(SparseEvolution(drop=drop, drop_schedule="constant"), fix_after=0.0)
    run.change()
    twin.change()
    for name in LAYERS:
        weight, old, new = twin.model.get_parameter(name).detach(), run.before[name], run.after[name]
        assert int(new.sum()) == int(old.sum())
        gone = old & ~new
        # Some of those dropped grow back by chance.
        dropped = round(0.3 * int(old.sum()))
        assert 0.5 * dropped < int(gone.sum()) <= dropped
        if drop == "magnitude":
            assert not bool((gone & ~smallest(weight.abs(), old, dropped)).any())
        else:
            for sign in (weight > 0, weight < 0):
                mine = old & sign
                assert not bool((gone & sign & ~smallest(weight.abs(), mine, round(0.3 * int(mine.sum())) + 1)).any())


def test_zero_weights_that_participate_are_told_from_those_that_do_not() -> None:
    run = Watched(SparseEvolution(drop_schedule="constant"))
    with torch.no_grad():
        run.model[5].weight.zero_()
    before = sparsefx.masks(run.model)["5.weight"]
    run.optimizer.zero_grad()  # zero gradients and weights: nothing but ties
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for state in run.optimizer.state.values():
        state["momentum_buffer"].zero_()
    run.optimizer.step()
    after = sparsefx.masks(run.model)["5.weight"]
    assert int(after.sum()) == int(before.sum())
    stays = before.flatten().nonzero().flatten()
    keep = len(stays) - round(0.3 * len(stays))
    assert bool(after.flatten()[stays[:keep]].all()), "of equal weights the first stay"


def test_an_optimizer_without_momentum_is_refused_at_attach() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", algorithm="sparse-momentum")
    for optimizer in (torch.optim.SGD(model.parameters(), 0.1), torch.optim.RMSprop(model.parameters(), 0.1)):
        with pytest.raises(OptimizerError, match="keeps no momentum"):
            sparsefx.attach(model, optimizer, total_steps=5, rewire_every=2)
    sparsefx.attach(
        model, torch.optim.SGD(model.parameters(), 0.1), total_steps=5, rewire_every=2, growth="random", redistribution="none"
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, r"steps_per_epoch= \(optimizer steps"),
        ({"rewire_every": 2, "grwoth": "random"}, "did you mean 'growth'"),
        ({"rewire_every": 2, "growth": "fastest"}, "'neuron', 'global'"),
        ({"rewire_every": 2, "drop_fraction": 1.5}, "drop_fraction=1.5"),
        ({"rewire_every": 2, "first": "magnitude"}, "acts in sparsify"),
        ({"rewire_every": 2, "growth": "global", "redistribution": "momentum"}, "ranks all layers together"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_remedy(options: dict[str, Any], word: str) -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", algorithm="sparse-momentum")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.raises(OptionError, match=word):
        sparsefx.attach(model, optimizer, total_steps=5, **options)
    sparsefx.attach(model, optimizer, total_steps=5, steps_per_epoch=2)


def test_layers_that_no_gradient_reached_stay_as_they_are_in_rigl() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    model = sparsefx.sparsify(Halves(), pattern="unstructured", density=0.3, algorithm="rigl")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=20, rewire_every=1)
    before = sparsefx.masks(model)
    model(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()
    after = sparsefx.masks(model)
    assert torch.equal(before["unused.weight"], after["unused.weight"])
    assert not torch.equal(before["used.weight"], after["used.weight"])
