"""Averages of weights, optimizers that step inside backward, and channels_last, while masks move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sparsefx
from tests.training import batches, loss_of, small_net, train


def test_an_average_taken_after_each_step_is_of_sparse_weights_and_one_inside_of_all() -> None:
    """An EMA that runs in a step hook registered before `attach` sees the weights that do not participate too."""
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    weight = model[5].weight
    seen: dict[str, Tensor] = {}
    optimizer.register_step_post_hook(lambda *given: seen.update(before=weight.detach().clone()))
    runtime = sparsefx.attach(model, optimizer, total_steps=10, exploit="none")
    optimizer.register_step_post_hook(lambda *given: seen.update(after=weight.detach().clone()))
    train(model, optimizer, batches(3))
    mask = sparsefx.masks(model)["5.weight"]
    dormant = runtime.state_dict()["parameters"]["5.weight"]["dormant"]
    assert bool(seen["before"][~mask].all())
    assert torch.equal(seen["before"], torch.where(mask, weight, dormant))
    assert torch.equal(seen["after"], weight.detach())
    assert not seen["after"][~mask].any()


def test_an_optimizer_for_each_parameter_that_steps_inside_backward_is_the_same_run() -> None:
    data = batches(6)
    expected = sparsefx.sparsify(small_net())
    ordinary = torch.optim.SGD(expected.parameters(), 0.1, momentum=0.9)
    sparsefx.attach(expected, ordinary, total_steps=10, exploit="none")
    train(expected, ordinary, data)
    model = sparsefx.sparsify(small_net())
    masked = {id(model.get_parameter(name)) for name in sparsefx.masks(model)}
    optimizers = {id(p): torch.optim.SGD([p], 0.1, momentum=0.9) for p in model.parameters()}
    runtime = sparsefx.attach(model, [one for key, one in optimizers.items() if key in masked], total_steps=10, exploit="none")

    def step_at_once(parameter: Tensor) -> None:
        optimizers[id(parameter)].step()
        optimizers[id(parameter)].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_at_once)
    for batch in data:
        loss_of(model, batch).backward()
    assert runtime.step == 6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert all(torch.equal(mask, sparsefx.masks(expected)[name]) for name, mask in sparsefx.masks(model).items())


def test_channels_last_moves_the_same_masks() -> None:
    runs: list[nn.Module] = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model: Any = sparsefx.sparsify(small_net().double().to(memory_format=layout))
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        sparsefx.attach(model, optimizer, total_steps=10, exploit="none")
        for x, y in batches(5):
            optimizer.zero_grad()
            loss_of(model, (x.double().to(memory_format=layout), y)).backward()
            optimizer.step()
        assert model[0].weight.is_contiguous(memory_format=layout)
        assert sparsefx.masks(model)["0.weight"].is_contiguous(memory_format=layout)
        runs.append(model)
    one, other = sparsefx.masks(runs[0]), sparsefx.masks(runs[1])
    assert all(torch.equal(one[name], other[name]) for name in one)
    for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
