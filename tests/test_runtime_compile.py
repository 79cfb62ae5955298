"""Training under torch.compile, gradient accumulation, clipping, averaged weights, checkpointed activations and torch.func."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import sparsefx
from tests.training import batches, loss_of, small_net, train


def attached(model: nn.Module, steps: int, **options: Any) -> tuple[torch.optim.Optimizer, sparsefx.MaskRuntime]:
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    return optimizer, sparsefx.attach(model, optimizer, total_steps=steps, **options)


def test_a_hundred_changes_of_masks_compile_nothing_anew_and_break_no_graph() -> None:
    torch._dynamo.reset()
    counts: dict[str, tuple[int, int]] = {}
    for kind in ("dense", "sparse"):
        model = small_net()
        if kind == "sparse":
            sparsefx.sparsify(model)
            optimizer, _ = attached(model, 101, exploit="none")
        else:
            optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
        counter = CompileCounter()
        runs = torch.compile(model, backend=counter, fullgraph=True)  # fullgraph: a graph break is an error
        moved = 0
        for batch in batches(101):
            before = sparsefx.masks(model)
            optimizer.zero_grad()
            loss_of(runs, batch).backward()
            optimizer.step()
            moved += any(not torch.equal(mask, before[name]) for name, mask in sparsefx.masks(model).items())
        assert moved > 50 if kind == "sparse" else moved == 0
        counts[kind] = (counter.frame_count, counter.op_count)
        torch._dynamo.reset()
    assert counts["sparse"] == counts["dense"] == (1, counts["dense"][1])


def test_accumulated_gradients_are_one_step() -> None:
    runs = []
    for parts in (1, 2):
        model = sparsefx.sparsify(small_net().eval())
        optimizer, runtime = attached(model, 4, exploit="none")
        for x, y in batches(4):
            optimizer.zero_grad()
            for position in range(parts):
                piece = slice(position, None, parts)
                (loss_of(model, (x[piece], y[piece])) / parts).backward()
            optimizer.step()
        assert runtime.step == 4
        runs.append(model)
    for one, other in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert all(torch.equal(mask, sparsefx.masks(runs[1])[name]) for name, mask in sparsefx.masks(runs[0]).items())


def test_clipping_sees_the_dense_gradient_and_the_model_stays_sparse() -> None:
    model = sparsefx.sparsify(small_net())
    optimizer, _ = attached(model, 4, exploit="none")
    for batch in batches(4):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        gradient = model[5].weight.grad
        assert bool(gradient[~sparsefx.masks(model)["5.weight"]].any())
        before = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        assert torch.equal(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01), before)
        optimizer.step()
        assert all(not model.get_parameter(name)[~mask].any() for name, mask in sparsefx.masks(model).items())


def test_averaged_weights_are_a_mean_of_sparse_ones_and_take_their_masks_when_asked() -> None:
    model = sparsefx.sparsify(small_net())
    optimizer, _ = attached(model, 12, exploit="none")
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = [p.detach().clone() for p in model.parameters()]
    for position, batch in enumerate(batches(6)):
        train(model, optimizer, [batch])
        averaged.update_parameters(model)
        with torch.no_grad():
            for mean, p in zip(expected, model.parameters(), strict=True):
                mean.copy_(p if position == 0 else mean.lerp(p, 0.5))
    for mean, p in zip(expected, averaged.module.parameters(), strict=True):
        torch.testing.assert_close(mean, p.detach())
    # The mean of weights under masks that move is denser than each of them; a load chooses the mask that fits it best.
    dense = copy.deepcopy(averaged.module.state_dict())
    assert int((dense["5.weight"] != 0).sum()) > dense["5.weight"].numel() // 2
    averaged.module.load_state_dict(dense)
    masks = sparsefx.masks(averaged.module)
    assert torch.equal(masks["5.weight"], sparsefx.patterns.parse("2:4").mask(dense["5.weight"]))
    assert torch.equal(averaged.module[5].weight, dense["5.weight"] * masks["5.weight"])


class _Checkpointed(nn.Module):
    def __init__(self, net: nn.Module, saves: bool) -> None:
        super().__init__()
        self.net, self.saves = net, saves

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.net, x, use_reentrant=False) if self.saves else self.net(x)
        return found


def test_checkpointed_activations_give_the_same_run() -> None:
    runs = []
    for saves in (False, True):
        model = sparsefx.sparsify(_Checkpointed(small_net().eval(), saves))
        optimizer, _ = attached(model, 5, exploit="none")
        train(model, optimizer, batches(5))
        runs.append(model)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].parameters(), runs[1].parameters(), strict=True))


@pytest.mark.parametrize("transform", ["call", "grad"])
def test_functional_calls_see_sparse_weights(transform: str) -> None:
    model = sparsefx.sparsify(small_net().eval())
    _, runtime = attached(model, 1)
    assert runtime.step == 0
    weights = {name: value.detach() for name, value in model.named_parameters()}
    batch = batches(1)[0]

    def loss(values: dict[str, Tensor]) -> Tensor:
        return loss_of(lambda x: torch.func.functional_call(model, values, (x,)), batch)  # type: ignore[arg-type]

    if transform == "call":
        assert torch.equal(loss(weights), loss_of(model, batch))
        return
    loss_of(model, batch).backward()
    for name, gradient in torch.func.grad(loss)(weights).items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)
