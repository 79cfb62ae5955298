"""Methods that act at every step: SR-STE, Top-KAST, DropBack, DEEP R and DSR against their rules."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.algorithms import DeepR, DropBack, Gradual, TopKAST
from sparsefx.errors import OptionError
from sparsefx.sparse_parameter import SparseParameter, sparse_parameters
from tests.training import batches, loss_of, small_net, train

NAME = "5.weight"


def record_of(model: nn.Module) -> SparseParameter:
    return {name: record for name, _, record in sparse_parameters(model)}[NAME]


def dense_of(model: nn.Module) -> Tensor:
    record, weight = record_of(model), model.get_parameter(NAME).detach()
    return weight.clone() if record.dormant is None else torch.where(record.mask, weight, record.dormant)


def gradient_at(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    (gradient,) = torch.autograd.grad(loss_of(model, batch), [model.get_parameter(NAME)])
    return gradient


def test_sr_ste_adds_the_decay_of_dormant_weights_to_the_gradient() -> None:
    model = sparsefx.sparsify(small_net(), pattern="2:4", algorithm="sr-ste")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=9, decay=0.5)
    for batch in batches(4):
        w, mask, gradient = dense_of(model), record_of(model).mask.clone(), gradient_at(model.train(), batch)
        train(model, optimizer, [batch])
        wanted = w - 0.1 * (gradient + 0.5 * w * ~mask)
        torch.testing.assert_close(dense_of(model), wanted)
        assert torch.equal(record_of(model).mask, sparsefx.patterns.parse("2:4").mask(dense_of(model)))


def test_a_fused_optimizer_under_a_grad_scaler_sees_the_decay_in_its_units() -> None:
    ends = []
    for scaled in (False, True):
        model = sparsefx.sparsify(small_net(), pattern="2:4", algorithm="sr-ste")
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        sparsefx.attach(model, optimizer, total_steps=9, decay=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for batch in batches(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(dense_of(model))
    torch.testing.assert_close(ends[0], ends[1])


def test_top_kast_updates_the_larger_set_and_keeps_the_rest() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.1, algorithm=TopKAST(rewire_every=2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    sparsefx.attach(model, optimizer, total_steps=9, backward_density=0.3, penalty=0.01)
    wanted_updated: Tensor | None = None
    for number, batch in enumerate(batches(5), 1):
        before, forward = dense_of(model), record_of(model).mask.clone()
        size = before.abs().flatten().sort(descending=True).values
        if wanted_updated is None or number % 2 == 1:
            assert torch.equal(forward, before.abs() >= size[round(0.1 * 2048) - 1])
            wanted_updated = before.abs() >= size[round(0.3 * 2048) - 1]
        gradient = gradient_at(model.train(), batch)
        train(model, optimizer, [batch])
        after = dense_of(model)
        assert torch.equal(after != before, wanted_updated)
        weight = model.get_parameter(NAME)
        assert weight.grad is not None
        penalty = torch.where(forward, 0.01, 0.1) * before
        torch.testing.assert_close(weight.grad, torch.where(wanted_updated, gradient + penalty, 0.0))


def test_top_kast_refuses_a_smaller_backward_set() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.5, algorithm="top-kast")
    with pytest.raises(OptionError, match="expected at least that"):
        sparsefx.attach(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=9, backward_density=0.3)


def test_dropback_keeps_the_weights_that_moved_farthest() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.2, algorithm=DropBack())
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    sparsefx.attach(model, optimizer, total_steps=9)
    origin = dense_of(model)
    moved = 0
    for batch in batches(5):
        w, mask, gradient = dense_of(model), record_of(model).mask.clone(), gradient_at(model.train(), batch)
        train(model, optimizer, [batch])
        updated = w - 0.5 * gradient
        wanted = sparsefx.patterns.parse("unstructured").mask(updated - origin, 0.2)
        assert torch.equal(record_of(model).mask, wanted)
        assert torch.equal(dense_of(model), updated * wanted)
        origin = origin * wanted
        moved += int((mask != wanted).sum())
    assert moved > 0


def test_deep_r_drops_weights_that_change_sign_and_grows_zeros_with_a_sign() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.2, algorithm=DeepR(penalty=0.01, noise=0.01))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    sparsefx.attach(model, optimizer, total_steps=30)
    dropped = 0
    for batch in batches(12):
        record = record_of(model)
        before, sign = record.mask.clone(), record.state["sign"].clone()
        w, gradient = dense_of(model), gradient_at(model.train(), batch)
        train(model, optimizer, [batch])
        after, now = record.mask, dense_of(model)
        assert int(after.sum()) == int(before.sum())
        stayed = before & after & (now != 0)
        assert bool((now * sign >= 0)[stayed].all()), "no weight that participates has crossed zero"
        # The walk is small beside the gradient's step: five deviations of the noise, and the penalty.
        assert bool(((now - (w - 0.5 * gradient))[stayed].abs() <= 0.5 * (5 * 0.01 + 0.01)).all())
        crossed = before & ((w - 0.5 * gradient) * sign < -0.5 * 0.06)
        assert not bool((now[crossed] != 0).any())
        dropped += int(crossed.sum())
        assert set(record.state["sign"].unique().tolist()) == {-1, 1}
    assert dropped > 0


def test_dsr_moves_its_threshold_and_its_weights() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.2, algorithm="dsr")
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    algorithm: dict[str, Any] = {"threshold": 1e-3, "drop_fraction": 0.2, "rewire_every": 1}
    runtime = sparsefx.attach(model, optimizer, total_steps=30, **algorithm)
    seen = []
    for batch in batches(12):
        train(model, optimizer, [batch])
        seen.append(runtime.report()["threshold"])
    assert seen[0] == 2e-3, "too few were below 0.001: it doubles"
    steps = [b / a for a, b in pairwise(seen)]
    assert set(steps) <= {0.5, 1.0, 2.0}
    assert 0.5 in steps or 1.0 in steps, "it settles where a fifth of the weights go"


def test_gradual_pruning_follows_its_cube_and_reaches_the_density_exactly() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.1, algorithm=Gradual(prune_until=0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    sparsefx.attach(model, optimizer, total_steps=24, rewire_every=3)
    shares = []
    for batch in batches(24):
        train(model, optimizer, [batch])
        shares.append(int(record_of(model).mask.sum()))
    expected = [1 if step < 3 else 0.1 + 0.9 * (1 - min(step // 3 * 3 / 12, 1.0)) ** 3 for step in range(1, 25)]
    assert shares == [round(share * 2048) for share in expected]
    assert shares[-1] == round(0.1 * 2048)
