"""Weights that a layer computes before each call, by a parametrization or a hook: they stay, and the report says why."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sparsefx.capture.state import unchanged

_HOOKS = (
    (prune.BasePruningMethod, "torch.nn.utils.prune", "prune.remove"),
    (WeightNorm, "torch.nn.utils.weight_norm", "remove_weight_norm"),
    (SpectralNorm, "torch.nn.utils.spectral_norm", "remove_spectral_norm"),
)


@torch.no_grad()
def computed_weights(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[Tensor, str]]:
    """The values of computed weights of linear layers and convolutions, and why they stay; the model is as before.

    Where a layer's own code computes with its parameter, as weight standardization does, it is the parameter's value.

    Args:
        model: whose weights they are.
        names: ``weight`` in the modules that multiply by them; those of modules that are no such layers are passed over.
    """
    found: dict[str, tuple[Tensor, str]] = {}
    if not (asked := list(names)):
        return found
    with unchanged(model):
        model.eval()  # a spectral norm in train mode changes what it computes with
        for name in asked:
            path, _, local_name = name.rpartition(".")
            layer = model.get_submodule(path)
            if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                continue
            why = _computed_by(layer, local_name)
            value = getattr(layer, local_name, None)
            if isinstance(value, Tensor):
                found[name] = (value.detach().clone(), why)
    return found


def _computed_by(layer: nn.Module, name: str) -> str:
    """What computes it, and how to have it no longer; the attribute is brought up to date."""
    told = "its weight is computed by {}; make it a parameter ({}) and prune again"
    if parametrize.is_parametrized(layer, name):
        return told.format("a parametrization", "parametrize.remove_parametrizations")
    for hook in layer._forward_pre_hooks.values():
        for kind, how, remedy in _HOOKS:
            if isinstance(hook, kind):
                hook(layer, ())
                return told.format(how, remedy)
    return "its weight is computed by code of its own, which cannot be cut"


__all__ = ["computed_weights"]
