"""Hand-made sparse models for the export tests: a pattern is applied and recorded without any other machinery."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsefx.patterns.base import Pattern
from sparsefx.sparse_parameter import SparseParameter, add_record


class HandPattern(Pattern):
    """N:M along the reduction axis, or the largest half of all weights, by the plainest means."""

    def __init__(self, name: str = "2:4") -> None:
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    @property
    def fixed_density(self) -> float | None:
        match = re.fullmatch(r"(\d+):(\d+)", self._name)
        return int(match[1]) / int(match[2]) if match else None

    def refusal(self, shape: Sequence[int], *, reduction_axis: int = 1) -> str | None:
        return None

    def _mask(self, scores: Tensor, density: float, reduction_axis: int) -> Tensor:
        match = re.fullmatch(r"(\d+):(\d+)", self._name)
        if match is None:
            return scores >= scores.flatten().kthvalue(max(1, round(scores.numel() * (1 - density))))[0]
        keep, size = int(match[1]), int(match[2])
        moved = scores.movedim(reduction_axis, -1)
        groups = moved.reshape(*moved.shape[:-1], -1, size)
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(keep, -1).indices, True)
        return mask.reshape(moved.shape).movedim(-1, reduction_axis).contiguous()


def make_sparse(module: nn.Module, name: str = "weight", *, pattern: str = "2:4", axis: int = 1) -> nn.Module:
    """Apply ``pattern`` to one parameter of ``module``, in place, and record it."""
    parameter = module._parameters[name]
    assert parameter is not None
    chosen = HandPattern(pattern)
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
