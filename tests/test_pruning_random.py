"""Random networks: pruning never changes an output, and never makes a network larger."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

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
    assert report.parameters_after <= report.parameters
    assert report.operations_after <= report.operations


class _Calls(TorchFunctionMode):
    """Counts the functions of torch that run; convolutions by their groups."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name == "conv2d":
            groups = args[6] if len(args) > 6 else 1
            name = "conv2d" if groups == 1 else "depthwise" if args[1].shape[1] == 1 else "grouped"
        self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_networks_are_made_of_everything_that_pruning_has_to_get_right() -> None:
    networks = 200
    made, shared = Counter[str](), 0
    for seed in range(networks):
        torch.manual_seed(seed)
        model, x = random_network(random.Random(seed).randrange)
        called = Counter[int]()

        def count(module: nn.Module, _: Any, called: Counter[int] = called) -> None:
            called[id(module)] += 1

        for layer in model.layers:  # type: ignore[union-attr]
            layer.register_forward_pre_hook(count)
        with torch.no_grad(), _Calls() as calls:
            model(x)
        made.update(calls.seen.keys())
        shared += any(times > 1 for times in called.values())
    made["shared module"] = shared
    expected = {
        *(
            "conv2d",
            "grouped",
            "depthwise",
            "conv_transpose2d",
            "batch_norm",
            "group_norm",
            "layer_norm",
            "instance_norm",
            "prelu",
        ),
        *("sigmoid", "softplus", "hardsigmoid", "cos", "add", "mul", "cat", "chunk", "channel_shuffle", "pixel_shuffle"),
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "interpolate", "flatten", "linear", "pad"),
        *("scaled_dot_product_attention", "softmax", "einsum", "shared module"),
    }
    rare = {name: made[name] for name in expected if made[name] < networks // 50}
    assert not rare, f"of {networks} networks hardly any has {rare}; all made: {made.most_common()}"
