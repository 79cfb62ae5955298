"""Stand-ins for modules that compute with whole rows, so that their width can be planned: with the same parameters and the same
couplings of channels, but each output channel is zero where its input channel and its weights are.

A LayerNorm is no function of single channels, so that `channel_plan` rightly never narrows one. A narrower network with weights
of its own may well have a narrower LayerNorm.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from sparsefx.passes.channels.plan import Attribute, ChannelPlan


class _Norm(nn.Module):
    """The scale and shift of a normalization, without the rest of it."""

    weight: Tensor
    bias: Tensor | None
    channel_axis: int

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) if self.channel_axis == -1 else (-1, *(1,) * (x.dim() - 2))
        scaled = x * self.weight.view(shape)
        bias = getattr(self, "bias", None)
        return scaled if bias is None else scaled + bias.view(shape)


class _Attention(nn.Module):  # its name stands in reasons why widths stay
    """The projections of an nn.MultiheadAttention: channels of queries, keys, values and residual stream are one width."""

    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    out_proj: nn.Linear

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        parts = [functional.linear(one, self.in_proj_weight, self.in_proj_bias).chunk(3, -1) for one in (query, key, value)]
        places = tuple(range(query.dim() - 1))
        mixed = parts[0][0] + parts[1][1].mean(places, keepdim=True) + parts[2][2].mean(places, keepdim=True)
        return self.out_proj(mixed + query) + query, None


_Attention.__qualname__ = nn.MultiheadAttention.__qualname__


def has_rows(model: nn.Module) -> bool:
    """Whether `stand_in` would change anything."""
    return any(_stands_in(module) is not None for module in model.modules())


def stand_in(model: nn.Module) -> None:
    """Put stand-ins in the place of normalizations over channels and of nn.MultiheadAttention, in place."""
    for module in list(model.modules()):
        found = _stands_in(module)
        if found is None:
            continue
        if found is _Attention:
            module.__dict__["batch_first"] = False  # lest an encoder layer takes its fused path, which looks at the weights alone
        else:
            module.__dict__["channel_axis"] = 1 if type(module).__name__.endswith("2d") else -1
        module.__class__ = found


def heads_of(model: nn.Module) -> dict[int, int]:
    """By width of an nn.MultiheadAttention: what it has to stay divisible by, for all heads to have one size."""
    found: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and _stands_in(module) is not None:
            found[module.embed_dim] = math.lcm(module.num_heads, found.get(module.embed_dim, 1))
    return found


def with_attributes(model: nn.Module, plan: ChannelPlan) -> ChannelPlan:
    """The plan, of a model with stand-ins, with what the modules that they stand for have to hold."""

    def left(name: str) -> int | None:
        axes = plan.kept.get(name, {})
        indices = axes.get(max(axes, default=0))
        return None if indices is None else int(indices.shape[-1])

    more: list[Attribute] = []
    for path, module in model.named_modules():
        found = _stands_in(module)
        if found is _Norm and (size := left(f"{path}.weight")) is not None:
            before = getattr(module, "normalized_shape", None)
            if before is not None:
                more.append(Attribute(path, "normalized_shape", before, (size,)))
        elif isinstance(module, nn.MultiheadAttention) and found is not None:
            size = left(f"{path}.in_proj_weight")
            if size is not None:
                names = ("embed_dim", "kdim", "vdim")
                more += [Attribute(path, name, getattr(module, name), size) for name in names]
                more.append(Attribute(path, "head_dim", module.head_dim, size // module.num_heads))
    return replace(plan, attributes=(*plan.attributes, *more))


def _stands_in(module: nn.Module) -> type[nn.Module] | None:
    """The class that stands in for a module, or None where nothing is known of it."""
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    if isinstance(module, nn.MultiheadAttention):
        plain = type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim and module.bias_k is None
        return _Attention if plain and not module.add_zero_attn else None
    named = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    if not named or next(module.children(), None) is not None or not {"weight"} <= own <= {"weight", "bias"}:
        return None
    return _Norm if all(module._parameters[name].dim() == 1 for name in own) else None  # type: ignore[union-attr]
