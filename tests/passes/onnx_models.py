"""Sparse models for the export tests: a pattern is applied and recorded without any other machinery."""

from __future__ import annotations

import torch
from torch import nn

from sparsefx.patterns import parse
from sparsefx.sparse_parameter import SparseParameter, add_record


def make_sparse(module: nn.Module, name: str = "weight", *, pattern: str = "2:4", axis: int = 1) -> nn.Module:
    """Apply ``pattern`` to one parameter of ``module``, in place, and record it."""
    parameter = module._parameters[name]
    assert parameter is not None
    chosen = parse(pattern)
    mask = chosen.mask(parameter.detach().float(), reduction_axis=axis)
    with torch.no_grad():
        parameter.mul_(mask)
    add_record(module, name, SparseParameter(chosen, float(mask.float().mean()), axis, mask))
    return module


def sparsify_by_hand(model: nn.Module) -> list[str]:
    """2:4 on every Linear and Conv2d with a multiple of 16 inputs; the names of the weights."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.shape[1] % 16 == 0:
            make_sparse(module)
            names.append(f"{name}.weight")
    return names


def randomise_norms(model: nn.Module) -> nn.Module:
    """Give BatchNorm layers statistics, scales and shifts other than zero and one, in place."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for tensor, low in (
                    (module.weight, 0.5),
                    (module.bias, -0.5),
                    (module.running_mean, -0.5),
                    (module.running_var, 0.5),
                ):
                    assert tensor is not None
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model
