"""Random networks: pruning never changes an output, and never makes a network larger."""

from __future__ import annotations

import copy

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsefx
from tests.channel_networks import random_network


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), seed=st.integers(0, 2**16), multiple=st.sampled_from([1, 1, 4]))
def test_outputs_stay_and_nothing_grows(data: st.DataObject, seed: int, multiple: int) -> None:
    torch.manual_seed(seed)
    model, x = random_network(lambda options: data.draw(st.integers(0, options - 1)))
    plan = sparsefx.channel_plan(model, x, multiple=multiple)
    pruned = sparsefx.apply_channel_plan(copy.deepcopy(model).double(), plan)
    with torch.no_grad():
        expected, made = model.double()(x.double()), pruned(x.double())
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * max(1.0, float(other.abs().max())), equal_nan=True)
    report = plan.report
    assert report.parameters_after == sum(parameter.numel() for parameter in pruned.parameters())
    assert report.parameters_after <= report.parameters + sum(report.new_biases.values())
    assert report.operations_after <= report.operations
