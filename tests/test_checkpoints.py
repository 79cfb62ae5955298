"""state_dicts of every kind into models of every kind: strict, both ways."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.sparse_parameter import sparse_parameters


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.ConvTranspose2d(32, 16, 2), nn.Flatten(), nn.Linear(400, 16))


def inputs() -> Tensor:
    return torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(3))


def assert_sparse(model: nn.Module) -> None:
    for name, mask in sparsefx.masks(model).items():
        weight = model.get_parameter(name).detach()
        assert not weight[~mask].any()
        assert int(mask.sum()) * 2 == mask.numel()


def test_the_keys_are_those_of_the_untouched_class() -> None:
    model = sparsefx.sparsify(net())
    assert list(model.state_dict()) == list(net().state_dict())
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in net().named_buffers()]


def test_a_sparse_checkpoint_loads_into_the_untouched_class_and_is_the_same_model() -> None:
    model, dense = sparsefx.sparsify(net()), net(seed=4)
    dense.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(dense(inputs()), model(inputs()))


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_checkpoint_loads_into_a_sparsified_model_and_is_masked(assign: bool) -> None:
    model, dense = sparsefx.sparsify(net()), net(seed=4)
    state = copy.deepcopy(dense.state_dict())
    model.load_state_dict(state, strict=True, assign=assign)
    assert_sparse(model)
    masks = sparsefx.masks(model)
    expected = sparsefx.masks(sparsefx.sparsify(net(seed=4)))
    for name, mask in masks.items():
        assert torch.equal(mask, expected[name])
        assert torch.equal(model.get_parameter(name), dense.get_parameter(name) * mask)
    for name, _, record in sparse_parameters(model):
        assert record.dormant is not None
        assert torch.equal(record.dormant, dense.get_parameter(name) * ~masks[name])


def test_a_sparse_checkpoint_loads_into_a_model_with_other_masks_and_nothing_is_lost() -> None:
    trained, model = sparsefx.sparsify(net(seed=4)), sparsefx.sparsify(net())
    model.load_state_dict(trained.state_dict(), strict=True)
    assert_sparse(model)
    assert torch.equal(model(inputs()), trained(inputs()))


@pytest.mark.parametrize("pattern", ["unstructured", "unstructured:global", "2:4-transposable", "block:1x8", "channel"])
def test_other_patterns_keep_a_sparse_checkpoint_whole(pattern: str) -> None:
    trained = sparsefx.sparsify(net(seed=4), pattern=pattern, exclude=nn.ConvTranspose2d)
    model = sparsefx.sparsify(net(), pattern=pattern, exclude=nn.ConvTranspose2d)
    model.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(model(inputs()), trained(inputs()))
    for name, mask in sparsefx.masks(model).items():
        assert not model.get_parameter(name)[~mask].any()


def test_a_partial_checkpoint_touches_only_what_it_has() -> None:
    model = sparsefx.sparsify(net())
    before = {name: (record.mask.clone(), record.dormant.clone()) for name, _, record in sparse_parameters(model)}
    state = {name: value for name, value in net(seed=4).state_dict().items() if name.startswith("4.")}
    model.load_state_dict(state, strict=False)
    for name, _, record in sparse_parameters(model):
        same = torch.equal(record.mask, before[name][0]) and torch.equal(record.dormant, before[name][1])
        assert same == (not name.startswith("4."))
    assert_sparse(model)


def test_loading_a_submodule_alone() -> None:
    model = sparsefx.sparsify(net())
    model[0].load_state_dict(net(seed=4)[0].state_dict())
    assert_sparse(model)
    assert torch.equal(model[0].weight, net(seed=4)[0].weight * sparsefx.masks(model)["0.weight"])


def test_a_copy_stays_watched_and_a_finalized_model_is_not() -> None:
    model = sparsefx.sparsify(net())
    twin = copy.deepcopy(model)
    twin.load_state_dict(net(seed=4).state_dict())
    assert_sparse(twin)
    final = sparsefx.finalize(twin)
    final.load_state_dict(net(seed=5).state_dict())
    assert torch.equal(final[4].weight, net(seed=5)[4].weight)
    assert_sparse(model)


def test_a_model_on_the_meta_device_gets_its_masks_with_its_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    sparsefx.sparsify(model)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    model.load_state_dict(dense.state_dict(), assign=True)
    assert_sparse(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=2)
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    assert_sparse(model)
