"""Every gradient is edited, and edited once: however much was accumulated, wherever it lies, and when a step is tried again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sparsefx


def build(algorithm: str, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    sparsefx.sparsify(model, pattern="unstructured", density=0.1, algorithm=algorithm)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsefx.attach(model, optimizer, total_steps=1000, **options)
    return model, optimizer


@pytest.mark.parametrize("algorithm", ["set", "rigl", "static"])
@pytest.mark.parametrize("counts", [(1, 2), (3, 1, 2), (2, 1)])
def test_gradients_of_any_number_of_micro_batches_are_masked(algorithm: str, counts: tuple[int, ...]) -> None:
    """New gradients lie where old ones lay, and counting versions alone takes one for the other."""
    model, optimizer = build(algorithm, **({} if algorithm == "static" else {"rewire_every": 999}))
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        optimizer.zero_grad()
        for _ in range(counts[step % len(counts)]):
            model(torch.randn(8, 64, generator=generator)).square().mean().backward()
        optimizer.step()
        for name, mask in sparsefx.masks(model).items():
            momentum = optimizer.state[model.get_parameter(name)]["momentum_buffer"]
            assert not momentum[~mask].any(), (step, name)


def test_a_step_that_is_tried_again_edits_once() -> None:
    model, optimizer = build("top-kast", penalty=0.5)
    model(torch.ones(4, 64)).square().mean().backward()
    weight = model[0].weight
    expected = None
    refuse = True

    def refusing(*_: Any) -> None:
        if refuse:
            raise RuntimeError("not now")

    optimizer.register_step_pre_hook(refusing)
    with pytest.raises(RuntimeError, match="not now"):
        optimizer.step()
    expected = weight.grad.clone()
    refuse = False
    optimizer.step()
    assert torch.equal(weight.grad, expected)


def test_a_gradient_that_has_changed_is_edited_again() -> None:
    model, optimizer = build("set", rewire_every=999)
    model(torch.ones(4, 64)).square().mean().backward()
    optimizer.step()
    model(torch.ones(4, 64)).square().mean().backward()
    optimizer.step()
    mask = sparsefx.masks(model)["0.weight"]
    assert not model[0].weight.grad[~mask].any()


def test_a_gradient_that_is_written_anew_unseen_is_edited_again() -> None:
    model, optimizer = build("set", rewire_every=999)
    model(torch.ones(4, 64)).square().mean().backward()
    optimizer.step()
    mask = sparsefx.masks(model)["0.weight"]
    model[0].weight.grad.data.copy_(torch.ones_like(mask, dtype=torch.float32))
    optimizer.step()
    assert not model[0].weight.grad[~mask].any()
    assert not optimizer.state[model[0].weight]["momentum_buffer"][~mask].any()
