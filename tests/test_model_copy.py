"""Models are copied in whatever state training left them."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm, weight_norm

import sparsefx
from sparsefx.capture.model_copy import copy_model
from sparsefx.errors import StateError


@dataclass
class Seen:
    last: Tensor | None = None


class Keeps(nn.Module):
    """Keeps what it computed: as an attribute, in containers, in a buffer, and in a module that is none of its children."""

    def __init__(self, *, buffered: bool) -> None:
        super().__init__()
        self.buffered = buffered
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 2)
        self.seen, self.list, self.others = Seen(), list[Tensor](), [nn.Identity()]
        self.register_buffer("state", torch.zeros(4, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.relu(self.first(x))
        self.seen.last, self.list[:], self.others[0].kept = self.last * 2, [self.last], (self.last, {"half": self.last / 2})
        if self.buffered:
            self.state = self.last
        made: Tensor = self.second(self.last)
        return made


def _stepped(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in model.first.parameters():  # type: ignore[union-attr]
            parameter[:3] = 0
    return optimizer


def test_a_copy_has_what_a_step_computed_without_its_graph() -> None:
    model = Keeps(buffered=True)
    _stepped(model)
    twin = copy_model(model)
    assert twin.last is twin.list[0] is twin.others[0].kept[0] is twin.state
    assert torch.equal(twin.last, model.last)
    assert twin.last.is_leaf
    assert not model.last.is_leaf
    assert twin.seen.last is not None
    assert twin.seen.last.is_leaf


def test_a_model_that_keeps_activations_is_pruned() -> None:
    model, x = Keeps(buffered=False), torch.randn(4, 8)
    optimizer = _stepped(model)
    kept, expected = model.last, model.eval()(x)
    model.train()(x)
    small = sparsefx.prune_channels(model, x, multiple=1)
    assert small.first.out_features == 5
    torch.testing.assert_close(small.eval()(x), expected)
    assert not model.last.is_leaf
    assert kept.grad_fn is not None
    sparsefx.prune_channels_(model, x, optimizer, multiple=1)
    torch.testing.assert_close(model.eval()(x), expected)
    model.train()(x).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_weights_that_hooks_compute_do_not_stand_in_the_way(norm: object) -> None:
    model, x = nn.Sequential(), torch.randn(4, 8)
    model.first, model.middle = nn.Linear(8, 8), nn.Linear(8, 4)
    model.normed = nn.Linear(4, 2)
    if norm is weight_norm:
        with pytest.warns(FutureWarning, match="weight_norm"):
            weight_norm(model.normed)
    else:
        spectral_norm(model.normed)
    optimizer = _stepped(model)
    expected = model.eval()(x)
    small = sparsefx.prune_channels(model, x, multiple=1)
    assert small.first.out_features == 5
    torch.testing.assert_close(small(x), expected)
    sparsefx.prune_channels_(model, x, optimizer, multiple=1)
    torch.testing.assert_close(model.eval()(x), expected)


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)).eval()
    model[1].guard = threading.Lock()
    with pytest.raises(StateError, match=r"Sequential cannot be copied, since '1\.guard' cannot \(cannot pickle"):
        sparsefx.prune_channels(model, torch.randn(4, 8), multiple=1)
