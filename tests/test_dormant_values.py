"""Dormant values take the memory of their number, whatever the layout, and come back bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparsefx
from sparsefx.algorithms.layer import Run
from sparsefx.algorithms.magnitude import Magnitude
from sparsefx.dormant_values import compact_of, spread
from sparsefx.errors import StateError
from sparsefx.ops import native
from sparsefx.ops.split import merge, split
from sparsefx.patterns import parse
from sparsefx.sparse_parameter import SparseParameter, sparse_parameters
from tests.training import batches, loss_of, small_net, train


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    gaps=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_all_that_the_mask_leaves_out_comes_back(shape: list[int], gaps: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randperm(len(shape), generator=generator).tolist()
    values = torch.randn([shape[axis] for axis in axes], generator=generator)
    values = values.permute(sorted(range(len(shape)), key=axes.__getitem__))
    mask = torch.empty_like(values, dtype=torch.bool).copy_(torch.rand(shape, generator=generator) < 0.5)
    if gaps:
        values = torch.stack([values, values], dim=-1)[..., 0]
    compact = compact_of(values, mask)
    assert compact.shape == (int((~mask).sum()),)
    back = spread(compact, mask)
    assert back.stride() == mask.stride() or 1 in shape
    assert torch.equal(back, values.masked_fill(mask, 0))


def test_values_that_a_mask_was_changed_without_are_told() -> None:
    mask = torch.tensor([True, False, True])
    with pytest.raises(StateError, match="changed in place by something else"):
        spread(torch.ones(2), mask)


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("1:4", 0.75), ("unstructured", 0.5), ("2:4-transposable", 0.5)])
def test_they_take_no_place_for_weights_that_participate(pattern: str, share: float) -> None:
    model = sparsefx.sparsify(small_net(), pattern=pattern)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=30, exploit="none")
    train(model, optimizer, batches(3))
    for name, parameter, record in sparse_parameters(model):
        assert record.compact is not None
        assert record.compact.untyped_storage().nbytes() == share * parameter.nbytes, name
        assert bool(record.compact.any())


def _every_value(model: torch.nn.Module) -> list[Tensor]:
    found = []
    for _, parameter, record in sparse_parameters(model):
        assert record.dormant is not None
        found.append(parameter.detach() + record.dormant)
    return found


@pytest.mark.parametrize("pattern", ["2:4", "unstructured", "unstructured:global"])
def test_moves_copies_and_pickles_keep_them(pattern: str) -> None:
    model = sparsefx.sparsify(small_net(), pattern=pattern)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runtime = sparsefx.attach(model, optimizer, total_steps=30, exploit="none")
    train(model, optimizer, batches(3))
    before = _every_value(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(before, _every_value(twin), strict=True))
    state = runtime.state_dict()
    model.to(memory_format=torch.channels_last)
    runtime.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, _every_value(model), strict=True))
    model.to(memory_format=torch.contiguous_format)
    train(model, optimizer, batches(1))
    model.to(torch.float64)
    for entry in optimizer.state.values():
        entry.clear()
    x, y = batches(1)[0]
    optimizer.zero_grad()
    loss_of(model, (x.double(), y)).backward()
    optimizer.step()
    assert all(record.compact is not None and record.compact.dtype is torch.float64 for _, _, record in sparse_parameters(model))


class Turned(Magnitude):
    """Magnitude rewiring whose masks are turned round after each step, by the way that algorithms have."""

    def move(self, run: Run) -> None:
        for layer in run.layers:
            layer.set_mask(~layer.mask, clear_moments=False)


def test_masks_that_an_algorithm_sets_keep_the_dormant_values_that_stay_dormant() -> None:
    model = sparsefx.sparsify(small_net(), pattern="unstructured", algorithm=Turned(exploit="none"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=30)
    train(model, optimizer, batches(3))
    for _, parameter, record in sparse_parameters(model):
        # What participated was dropped, and what came is zero: nothing is left of either.
        assert record.compact is not None
        assert record.compact.numel() == int((~record.mask).sum())
        assert not bool(record.compact.any())
        assert not bool(parameter.any())


@pytest.mark.skipif(not native.available(), reason="the compiled kernels were not built")
def test_a_mask_that_is_changed_by_hand_is_told_before_any_weight_changes() -> None:
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsefx.attach(model, optimizer, total_steps=30, exploit="none")
    train(model, optimizer, batches(2))
    _, _, record = next(sparse_parameters(model))
    record.mask[0] = True
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(StateError, match="changed in place by something else"):
        train(model, optimizer, batches(1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reached", [False, True])
def test_a_full_mask_that_is_changed_by_hand_is_told_too(reached: bool, compiled: bool) -> None:
    mask = torch.ones(64, 64, dtype=torch.bool)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    record = SparseParameter(parse("unstructured"), 1.0, 1, mask, compact_of(weight, mask))
    mask[0] = False
    before = weight.clone()
    options = {"rewire": False, "reached": [~mask]} if reached else {}
    with pytest.raises(StateError, match="changed in place by something else"):
        (split if reached else merge)([weight], [record], compiled=compiled, **options)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_weight_is_merged_where_one_of_them_cannot_be(compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weights, records = [], []
    for gaps in (False, True, False, True):
        weight = torch.randn(16, 16, generator=generator)
        weight = torch.stack([weight, weight], dim=-1)[..., 0] if gaps else weight
        mask = torch.rand(16, 16, generator=generator) < 0.5
        records.append(SparseParameter(parse("unstructured"), 0.5, 1, mask, compact_of(weight, mask)))
        weights.append(weight.masked_fill_(~mask, 0))
    records[-1].mask.logical_not_()
    records[-1].mask[0] = True
    before = [weight.clone() for weight in weights]
    with pytest.raises(StateError, match="changed in place by something else"):
        merge(weights, records, compiled=compiled)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, from which a state was saved")
def test_a_state_that_was_saved_on_another_device_is_loaded() -> None:
    model = sparsefx.sparsify(small_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runtime = sparsefx.attach(model, optimizer, total_steps=30, exploit="none")
    train(model, optimizer, batches(3))
    before, state = _every_value(model), runtime.state_dict()
    for saved in state["parameters"].values():
        saved.update({key: value.cuda() for key, value in saved.items() if isinstance(value, Tensor)})
    runtime.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, _every_value(model), strict=True))
