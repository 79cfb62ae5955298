"""How weights are divided among layers: exactly, and as the published rules have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparsefx
from sparsefx.algorithms.allocate import allocate, none_empty
from sparsefx.errors import OptionError, PatternError
from sparsefx.sparse_parameter import sparse_parameters
from tests.training import batches, small_net, train

_SHARES = st.one_of(st.floats(0, 1e30), st.just(float("nan")), st.just(float("inf")), st.just(-1.0), st.just(5e-324))


@given(st.lists(st.tuples(_SHARES, st.integers(0, 50)), min_size=1, max_size=12), st.data())
def test_nothing_is_lost_or_made_up_in_dividing(places: list[tuple[float, int]], data: st.DataObject) -> None:
    shares, capacities = [share for share, _ in places], [capacity for _, capacity in places]
    total = data.draw(st.integers(0, sum(capacities)))
    given_ = allocate(total, shares, capacities)
    assert sum(given_) == total
    assert all(0 <= count <= capacity for count, capacity in zip(given_, capacities, strict=True))


def test_what_does_not_fit_goes_to_the_others_in_proportion() -> None:
    assert allocate(10, [1, 1, 2], [100, 100, 100]) == [3, 2, 5]
    assert allocate(10, [1, 1, 8], [100, 100, 4]) == [3, 3, 4]
    assert allocate(10, [0, 0, 1], [4, 4, 4]) == [3, 3, 4]
    assert none_empty([0, 5, 3]) == [1, 4, 3]
    with pytest.raises(ValueError, match="cannot be divided"):
        allocate(13, [1, 1, 1], [4, 4, 4])


def three_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.Flatten(), nn.Linear(32 * 16, 64), nn.Linear(64, 16))


def counts(model: nn.Module) -> list[int]:
    return [int(mask.sum()) for mask in sparsefx.masks(model).values()]


def test_erdos_renyi_kernel_is_solved_with_layers_that_become_dense() -> None:
    sizes, sums = [4608, 32768, 1024], [32 + 16 + 3 + 3, 64 + 512, 64 + 16]
    total = round(0.1 * sum(sizes))
    model = sparsefx.sparsify(three_layers(), pattern="unstructured", density=0.1, densities="erk", algorithm="rigl")
    scale = total / sum(sums)
    assert scale * sums[2] < sizes[2]
    ideal = [scale * side for side in sums]
    assert counts(model) == [round(value) for value in ideal]
    assert sum(counts(model)) == total
    # Here that scale would put the last layer above 1, so it is dense, and the others share the rest.
    model = sparsefx.sparsify(three_layers(), pattern="unstructured", density=0.4, densities="erk", algorithm="rigl")
    total = round(0.4 * sum(sizes))
    assert counts(model)[2] == sizes[2]
    assert sum(counts(model)) == total


def test_global_densities_are_those_of_one_ranking_and_stay_with_the_layers() -> None:
    one = sparsefx.sparsify(three_layers(), pattern="unstructured:global", density=0.1, algorithm="static")
    own = sparsefx.sparsify(three_layers(), pattern="unstructured", density=0.1, densities="global", algorithm="magnitude")
    assert counts(one) == counts(own)
    optimizer = torch.optim.SGD(own.parameters(), 0.01)
    sparsefx.attach(own, optimizer, total_steps=9, exploit="none")
    before = sparsefx.masks(own)
    for _ in range(3):
        own(torch.randn(2, 16, 4, 4)).square().sum().backward()
        optimizer.step()
    assert counts(own) == counts(one)
    assert any(not torch.equal(before[name], mask) for name, mask in sparsefx.masks(own).items())


def test_densities_by_name_and_glob() -> None:
    wanted = {"[23]*": 0.5, "3": 0.25, "0.weight": 1.0}
    model = sparsefx.sparsify(three_layers(), pattern="unstructured", density=0.1, densities=wanted)
    assert counts(model) == [4608, 16384, 256]
    report = {layer.name: layer.density for layer in sparsefx.audit(model).layers}
    assert report == {"0": 1.0, "2": 0.5, "3": 0.25}


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"densities": "erdos"}, OptionError, "'uniform', 'erk', 'global', 'steps'"),
        ({"densities": "ERK"}, OptionError, "expected 'uniform'"),
        ({"densities": {"4": 0.5}}, OptionError, "no layer that becomes sparse"),
        ({"densities": {"3": 0.0}}, PatternError, "density 0.0"),
        ({"pattern": "2:4", "density": None, "densities": "erk"}, OptionError, "always 0.5"),
        ({"pattern": "unstructured:global", "densities": "erk"}, OptionError, "one threshold"),
        ({"pattern": "channel", "densities": "global"}, OptionError, "differ in size"),
        ({"densities": "steps"}, OptionError, "does not empty filters"),
        ({"pattern": "channel", "densities": "steps"}, OptionError, "below a step"),
    ],
)
def test_densities_that_do_not_fit_are_refused_and_nothing_changes(options: dict[str, Any], error: type, word: str) -> None:
    model = three_layers()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=word):
        sparsefx.sparsify(model, **{"pattern": "unstructured", "density": 0.1, **options})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    sparsefx.sparsify(model)


@pytest.mark.parametrize("pattern", ["unstructured", "block:1x8"])
def test_a_sparse_checkpoint_with_other_densities_stays_whole(pattern: str) -> None:
    model = sparsefx.sparsify(small_net(), pattern=pattern, density=0.2, algorithm="sparse-momentum")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsefx.attach(model, optimizer, total_steps=40, rewire_every=2)
    first = counts(model)
    train(model, optimizer, batches(20))
    assert counts(model) != first
    other = sparsefx.sparsify(small_net(7), pattern=pattern, density=0.2, algorithm="sparse-momentum")
    other.load_state_dict(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert sum(counts(other)) == sum(first)
    for _, parameter, record in sparse_parameters(other):
        assert float(record.mask.float().mean()) == pytest.approx(record.density)
        assert not parameter.detach()[~record.mask].any()


def test_a_dense_checkpoint_is_cut_to_each_layers_density() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.2, algorithm="rigl")
    first = counts(model)
    model.load_state_dict(small_net(3).state_dict())
    assert counts(model) == first
    assert all(record.left_out is None for _, _, record in sparse_parameters(model))
