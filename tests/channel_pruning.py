"""Small models around a function, and how pruning them is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.passes.channels.plan import ChannelPlan


class Around(nn.Module):
    """Layers by name, and a function of them as the forward."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """Statistics and biases that would show wherever they are lost."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return model.eval()


@torch.no_grad()
def empty(weight: Tensor, *channels: int, axis: int = 0) -> None:
    weight.movedim(axis, 0)[list(channels)] = 0


def pruned(model: nn.Module, x: Tensor, multiple: int = 1) -> tuple[nn.Module, ChannelPlan]:
    """The pruned model, after it was compared with the given one in float64."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = sparsefx.channel_plan(model, x, multiple=multiple)
    small = sparsefx.apply_channel_plan(model, plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    wide, narrow = copy.deepcopy(model).double(), sparsefx.apply_channel_plan(copy.deepcopy(model).double(), plan)
    with torch.no_grad():
        expected, made = wide(x.double()), narrow(x.double())
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-12)
    assert type(small) is type(model)
    return small, plan


def widths(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


IMAGE = (2, 3, 8, 8)
