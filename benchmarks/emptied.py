"""Models with half of their filters emptied, group by group of filters that belong together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsefx.passes.channels.graph import capture_channels
from sparsefx.passes.propagate_channels import propagate_channels

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Biases, and shifts and statistics of batch norms, that matter; in place."""

    def fill(tensor: Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            fill(module.weight, 0.5, 1.5)
            fill(module.bias, -0.5, 0.5)
            fill(module.running_mean, -0.2, 0.2)
            fill(module.running_var, 0.5, 1.5)
        elif isinstance(module, _LAYERS):
            fill(module.bias, -0.2, 0.2)


@torch.no_grad()
def empty_half(model: nn.Module, image: Tensor, generator: torch.Generator, *, biases: bool, share: float = 0.5) -> int:
    """Set a random half of the filters of each layer to zero, the same ones in layers that residuals tie together; in place.

    Args:
        model: in eval mode. Filters that make its outputs stay.
        image: example input.
        generator: of the choice.
        biases: whether biases and batch norms of empty filters stay; otherwise what they add is zero too.
        share: of the filters that is emptied.

    Returns:
        How many filters were emptied.
    """
    propagation = propagate_channels(model, [capture_channels(model, (image,), {})])
    roots, pinned = propagation.labels.roots(), {0}
    for pin in propagation.facts.pins:
        pinned |= set(np.unique(propagation.labels.roots()[pin.labels]).tolist())
    emptied: set[int] = set()
    seen: set[int] = set()
    modules = dict(model.named_modules())
    named: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    axes = {name: roots[labels] for (name, axis), labels in propagation.facts.axes.items() if axis == 0}
    layers = {name for name in axes if name.endswith("weight") and isinstance(modules[name.rpartition(".")[0]], _LAYERS)}
    for name in axes:
        if name in layers:
            new = sorted(set(axes[name].tolist()) - seen - pinned)
            seen |= set(new)
            order = torch.randperm(len(new), generator=generator)[: int(share * len(new))]
            emptied |= {new[index] for index in order.tolist()}
    count = 0
    for name, labels in axes.items():
        chosen = torch.from_numpy(np.flatnonzero(np.isin(labels, list(emptied))))
        if name in layers:
            named[name][chosen] = 0
            count += len(chosen)
        elif not biases and name.endswith(("bias", "running_mean")):
            named[name][chosen] = 0
    return count
