"""Steps whose place a change of masks takes, in the situations that training loops bring."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsefx
from tests.training import batches, loss_of, small_net, train


def rigl(optimizer: Any = None, **options: Any) -> tuple[torch.nn.Module, Any, Any]:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.2, algorithm="rigl")
    made = torch.optim.AdamW(model.parameters(), 0.01) if optimizer is None else optimizer(model.parameters())
    return model, made, sparsefx.attach(model, made, total_steps=20, rewire_every=2, **options)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_closure_gives_the_same_run() -> None:
    plain, optimizer, _ = rigl()
    train(plain, optimizer, batches(6))
    model, optimizer, _ = rigl()
    for batch in batches(6):

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert same(plain, model)


def test_a_step_that_raises_is_mended_by_the_next() -> None:
    class Fails(torch.optim.SGD):
        broken = False

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                raise RuntimeError("out of memory")
            return super().step(closure)

    data = batches(3)
    model, optimizer, runtime = rigl(lambda p: Fails(p, 0.05))
    same_model, other, _ = rigl(lambda p: torch.optim.SGD(p, 0.05))
    train(model, optimizer, data[:1])
    train(same_model, other, data)
    optimizer.zero_grad()
    loss_of(model, data[1]).backward()
    optimizer.broken = True
    masks = sparsefx.masks(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsefx.masks(model).items())
    optimizer.broken = False
    optimizer.step()
    train(model, optimizer, data[2:])
    assert runtime.step == 3
    assert same(model, same_model)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflow_at", [2, 3])
def test_a_step_that_the_grad_scaler_skips_changes_nothing(fused: bool, overflow_at: int) -> None:
    model, optimizer, runtime = rigl(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number, batch in enumerate(batches(4), 1):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        before = copy.deepcopy((model[0].weight.detach(), sparsefx.masks(model)))
        if number == overflow_at:
            model[0].weight.grad[0, 0, 0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if number == overflow_at:
            assert torch.equal(before[0], model[0].weight)
            assert all(torch.equal(mask, before[1][name]) for name, mask in sparsefx.masks(model).items())
            assert model[0].weight.grad is not None
    assert runtime.step == 3


def test_gradients_can_be_reused_by_a_loop_that_never_sets_them_to_none() -> None:
    model, optimizer, _ = rigl()
    twin, other, _ = rigl()
    train(twin, other, batches(5))
    kept = None
    for batch in batches(5):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, batch).backward()
        optimizer.step()
        assert kept is None or kept is model[0].weight.grad
        kept = model[0].weight.grad
    assert same(model, twin)


def test_two_optimizers_each_keep_their_own_count() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", density=0.2, algorithm="sparse-momentum")
    optimizers = [
        torch.optim.SGD([*model[0].parameters(), *model[1].parameters()], 0.05, momentum=0.9),
        torch.optim.AdamW(model[5].parameters(), 0.01),
    ]
    sparsefx.attach(model, optimizers, total_steps=20, rewire_every=2)
    first = {name: int(mask.sum()) for name, mask in sparsefx.masks(model).items()}
    before = sparsefx.masks(model)
    for batch in batches(6):
        model.zero_grad()
        loss_of(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert {name: int(mask.sum()) for name, mask in sparsefx.masks(model).items()} == first
    assert all(not torch.equal(mask, before[name]) for name, mask in sparsefx.masks(model).items())


def test_training_in_bfloat16_keeps_the_count() -> None:
    for algorithm in ("rigl", "sparse-momentum", "set", "deep-r", "top-kast", "sr-ste", "dropback", "dsr"):
        model = sparsefx.sparsify(small_net().to(torch.bfloat16), pattern="unstructured", density=0.2, algorithm=algorithm)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        options = {} if algorithm in ("deep-r", "dropback") else {"rewire_every": 2}
        sparsefx.attach(model, optimizer, total_steps=20, **options)
        total = sum(int(mask.sum()) for mask in sparsefx.masks(model).values())
        for x, y in batches(4):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x.to(torch.bfloat16)).float(), y).backward()
            optimizer.step()
            assert sum(int(mask.sum()) for mask in sparsefx.masks(model).values()) == total, algorithm
