"""Whether a layer adds a bias that it does not have yet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsefx.capture.model_copy import copy_model
from sparsefx.layers import runs_own_forward


@torch.no_grad()
def takes_a_bias(layer: nn.Linear | nn.modules.conv._ConvNd) -> bool:
    """Whether a layer without a bias would add one to its outputs.

    Where its class has a forward of its own, as many libraries' layers have, that is tried out on a copy in float64.
    """
    if runs_own_forward(layer):
        return True
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    try:
        trial = copy_model(layer).to("cpu", torch.float64).eval()
        forward: Callable[..., Tensor] = type(trial).forward  # without the user's hooks
        if isinstance(trial, nn.Linear):
            bias, given, places = draw(trial.out_features), draw(2, trial.in_features), []
        else:
            places = [(size - 1) * gap + 3 for size, gap in zip(trial.kernel_size, trial.dilation, strict=True)]
            bias, given = draw(trial.out_channels), draw(2, trial.in_channels, *places)
        before = forward(trial, given)
        trial._parameters["bias"] = nn.Parameter(bias)
        return torch.allclose(forward(trial, given), before + bias.view(-1, *(1 for _ in places)), rtol=1e-10, atol=1e-10)
    except Exception:  # whatever the layer's own code raises on other inputs than those of its model
        return False


__all__ = ["takes_a_bias"]
