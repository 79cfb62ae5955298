"""lottery_ticket: the ticket starts from early weights, keeps its masks, and ends where it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.errors import OptionError, StateError
from tests.training import batches, loss_of, small_net

DATA = batches(20)


class Trainer:
    """A user's train function that notes what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.starts: list[dict[str, torch.Tensor]] = []
        self.densities: list[float] = []

    def __call__(self, model: nn.Module, first: int, last: int, state: Any) -> Any:
        self.calls.append((first, last))
        self.starts.append({name: value.clone() for name, value in model.state_dict().items()})
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        if state is not None:
            optimizer.load_state_dict(state)
        for batch in DATA[first:last]:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            for name, mask in sparsefx.masks(model).items():
                assert not model.get_parameter(name).detach()[~mask].any()
        return optimizer.state_dict()


@pytest.mark.parametrize(("pattern", "density"), [("unstructured", 0.2), ("2:4", None)])
def test_the_ticket_trains_from_early_weights_with_masks_of_late_ones(pattern: str, density: float | None) -> None:
    train = Trainer()
    dense = small_net()
    late_model = small_net()
    late = Trainer()
    late(late_model, 4, 20, late(late_model, 0, 4, None))
    ticket = sparsefx.lottery_ticket(dense, train, total_steps=20, rewind_to=4, pattern=pattern, density=density)
    assert ticket is dense
    assert train.calls == [(0, 4), (4, 20), (4, 20)]
    masks = sparsefx.masks(ticket)
    chosen = sparsefx.patterns.parse(pattern)
    early, rewound = train.starts[1], train.starts[2]
    for name, value in early.items():
        assert torch.equal(value * masks[name] if name in masks else value, rewound[name]), name
    for name, mask in masks.items():
        assert torch.equal(mask, chosen.mask(late_model.get_parameter(name).detach(), density))
        assert not ticket.get_parameter(name).detach()[~mask].any()


def test_rounds_prune_step_by_step() -> None:
    train = Trainer()
    ticket = sparsefx.lottery_ticket(small_net(), train, total_steps=10, rewind_to=0, density=0.25, rounds=2)
    assert train.calls == [(0, 10)] * 3
    shares = [float((start["0.weight"] != 0).float().mean()) for start in train.starts]
    assert shares == pytest.approx([1.0, 0.5, 0.25], abs=1e-3)
    first, second = (start["0.weight"] != 0 for start in train.starts[1:])
    assert bool((first | ~second).all()), "what one round drops, the next does not bring back"
    assert torch.equal(sparsefx.masks(ticket)["0.weight"], second)


def test_bad_options_are_refused_before_any_training() -> None:
    train = Trainer()
    for options, word in [
        ({"total_steps": 0}, "total_steps"),
        ({"total_steps": 5, "rewind_to": 5}, "rewind_to"),
        ({"total_steps": 5, "rounds": 2, "pattern": "2:4"}, "rounds=2"),
    ]:
        with pytest.raises(OptionError, match=word):
            sparsefx.lottery_ticket(small_net(), train, **options)
    with pytest.raises(StateError, match="sparsified already"):
        sparsefx.lottery_ticket(sparsefx.sparsify(small_net()), train, total_steps=5)
    assert train.calls == []


def test_a_train_function_without_optimizer_steps_is_told() -> None:
    with pytest.raises(StateError, match="no optimizer step"):
        sparsefx.lottery_ticket(small_net(), lambda model, first, last, state: None, total_steps=5)


def test_steps_of_other_weights_are_no_training_of_the_ticket() -> None:
    other = torch.nn.Parameter(torch.zeros(1))

    def train(model: torch.nn.Module, first: int, last: int, state: object) -> None:
        other.grad = torch.ones(1)
        torch.optim.SGD([other], 0.1).step()

    with pytest.raises(StateError, match="no optimizer step on the masked"):
        sparsefx.lottery_ticket(small_net(), train, total_steps=5, density=0.5)


def test_an_optimizer_as_state_is_refused_since_its_copy_would_train_nothing() -> None:
    def train(model: torch.nn.Module, first: int, last: int, state: object) -> object:
        return {"optimizer": torch.optim.SGD(model.parameters(), 0.1)}

    with pytest.raises(OptionError, match=r"returned a SGD as its state.*state_dict"):
        sparsefx.lottery_ticket(small_net(), train, total_steps=5, rewind_to=2, density=0.5)
