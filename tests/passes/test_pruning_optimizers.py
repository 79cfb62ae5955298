"""Optimizers follow a cut: groups, lists and state; what cannot follow is refused, and nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import OptimizerError


def _net(*, biased: bool = True) -> nn.Sequential:
    """Half of the first layer's filters are constant; the layer behind it has no bias that could take them over."""
    net = nn.Sequential(
        *(nn.Linear(8, 32, bias=biased), nn.Sigmoid(), nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 2, bias=biased))
    )
    with torch.no_grad():
        net.get_parameter("0.weight")[:16] = 0
    return net


def _names(model: nn.Module, group: dict[str, Any]) -> list[str]:
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    return [named[id(parameter)] for parameter in group["params"]]


def _prune(model: nn.Module, *optimizers: torch.optim.Optimizer) -> Tensor:
    x = torch.randn(16, 8)
    expected = model(x).detach()
    plan = sparsefx.prune_channels_(model, x, optimizers, multiple=1)
    assert dict(plan.new_biases) == {"2.bias": 32}
    torch.testing.assert_close(model(x), expected)
    return x


def _step(model: nn.Module, x: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """One step, which moves every parameter."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.zero_grad()
    (model(x) - 1).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_an_added_bias_goes_to_the_optimizer_of_the_vectors() -> None:
    model = _net()
    muon = torch.optim.Muon([parameter for parameter in model.parameters() if parameter.dim() == 2], lr=1e-2)
    adam = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.dim() == 1])
    x = _prune(model, muon, adam)
    assert _names(model, muon.param_groups[0]) == ["0.weight", "2.weight", "4.weight"]
    assert _names(model, adam.param_groups[0]) == ["0.bias", "2.bias", "4.bias"]
    _step(model, x, muon, adam)


def test_an_added_bias_joins_the_nearest_group_of_vectors() -> None:
    model = nn.Sequential(_net(), _net())
    model[0][4], model[1][0] = nn.Linear(32, 8), nn.Linear(8, 32)
    groups = []
    for number, part in enumerate(model):
        for rank in (1, 2):
            groups.append({"params": [p for p in part.parameters() if p.dim() == rank], "lr": 0.1 * number + 0.01 * rank})
    optimizer = torch.optim.SGD(groups)
    with torch.no_grad():
        model.get_parameter("1.0.weight")[:16] = 0
    x = torch.randn(4, 8)
    plan = sparsefx.prune_channels_(model, x, optimizer, multiple=1)
    assert dict(plan.new_biases) == {"0.2.bias": 32, "1.2.bias": 32}
    assert [_names(model, group) for group in optimizer.param_groups] == [
        *(["0.0.bias", "0.2.bias", "0.4.bias"], ["0.0.weight", "0.2.weight", "0.4.weight"]),
        *(["1.0.bias", "1.2.bias", "1.4.bias"], ["1.0.weight", "1.2.weight", "1.4.weight"]),
    ]
    _step(model, x, optimizer)


def test_an_added_bias_joins_its_weight_where_no_group_holds_vectors() -> None:
    model = _net(biased=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _step(model, _prune(model, optimizer), optimizer)


def test_an_optimizer_that_takes_no_vectors_is_refused_and_nothing_changes() -> None:
    model = _net(biased=False)
    optimizer = torch.optim.Muon(model.parameters())
    _refused(model, optimizer, match="Muon takes none .*only supports 2D")


def test_the_names_of_a_group_stay_beside_its_parameters() -> None:
    model = _net()
    optimizer = torch.optim.AdamW(model.named_parameters())
    _step(model, torch.randn(4, 8), optimizer)
    with torch.no_grad():
        model.get_parameter("0.weight")[:16] = 0
    x = _prune(model, optimizer)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert _names(model, optimizer.param_groups[0]) == optimizer.param_groups[0]["param_names"]
    _step(model, x, optimizer)
    again = torch.optim.AdamW(model.named_parameters())
    again.load_state_dict(optimizer.state_dict())
    for name, parameter in model.named_parameters():
        assert again.state[parameter]["exp_avg"].shape == parameter.shape, name


def test_names_with_another_start_keep_it() -> None:
    model = _net()
    optimizer = torch.optim.SGD([(f"module.{name}", parameter) for name, parameter in model.named_parameters()], lr=0.1)
    _prune(model, optimizer)
    assert optimizer.param_groups[0]["param_names"] == [f"module.{name}" for name, _ in model.named_parameters()]


def test_lbfgs_which_holds_the_list_of_its_group_goes_on_training() -> None:
    model = _net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    x = _prune(model, optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def closure() -> float:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return float(loss.detach())

    first = closure()
    optimizer.step(closure)
    assert closure() < first
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_lbfgs_that_made_steps_is_refused_whatever_is_cut() -> None:
    model = _net()
    # Its state is kept for its first parameter alone, which is not cut here.
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.LBFGS([parameters.pop("4.bias"), *parameters.values()], max_iter=2)
    x = torch.randn(16, 8)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    with torch.no_grad():
        model.get_parameter("0.weight")[:16] = 0
    _refused(model, optimizer, match="LBFGS keeps gradients of all parameters as one vector")


class Keeps(torch.optim.Optimizer):
    """Keeps what it is told to for each matrix."""

    def __init__(self, params: Any, keep: Callable[[Tensor], Any]) -> None:
        super().__init__(params, {"lr": 0.1})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() == 2:
                    self.state[parameter]["kept"] = keep(parameter.detach())

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad


class Short(Tensor):
    """A tensor of a class of its own that cannot be indexed."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "index_select":
            raise TypeError("no index_select of short tensors")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        (lambda w: [torch.eye(w.shape[0]), torch.eye(w.shape[1])], r"'kept' with a tensor of shape .*cannot be cut along"),
        (lambda w: {"factors": (torch.eye(w.shape[0]),)}, r"'kept' with a tensor of shape .*cannot be cut along"),
        (lambda w: w.sum(0), r"'kept' of shape .*cannot be cut along"),
        (lambda w: w.as_subclass(Short), "no index_select of short tensors"),
    ],
)
def test_state_that_cannot_be_cut_along_is_refused_and_nothing_changes(keep: Callable[[Tensor], Any], match: str) -> None:
    model = _net()
    _refused(model, Keeps(model.parameters(), keep), match=match)


def test_state_that_has_no_size_goes_along() -> None:
    model = _net()
    optimizer = Keeps(model.parameters(), lambda w: [torch.tensor(3.0), "fast", None, 7])
    _step(model, _prune(model, optimizer), optimizer)
    assert optimizer.state[model.get_parameter("2.weight")]["kept"] == [torch.tensor(3.0), "fast", None, 7]


def test_an_optimizer_with_a_list_of_its_own_is_refused_and_nothing_changes() -> None:
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.matrices = {"all": [parameter for parameter in model.parameters() if parameter.dim() == 2]}  # type: ignore[attr-defined]
    _refused(model, optimizer, match="'matrices' too, which would go on holding '[02].weight'")


def _refused(model: nn.Module, optimizer: torch.optim.Optimizer, match: str) -> None:
    before, held = copy.deepcopy(model.state_dict()), [list(group["params"]) for group in optimizer.param_groups]
    state = {id(parameter): dict(entries) for parameter, entries in optimizer.state.items()}
    with pytest.raises(OptimizerError, match=match):
        sparsefx.prune_channels_(model, torch.randn(16, 8), optimizer, multiple=1)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for group, parameters in zip(optimizer.param_groups, held, strict=True):
        assert all(one is other for one, other in zip(group["params"], parameters, strict=True))
    assert {id(parameter): entries for parameter, entries in optimizer.state.items()}.keys() == state.keys()
