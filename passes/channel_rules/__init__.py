"""The table of rules: what each ATen op does to channels. One small function an op, a file a family.

An op that is not in the table pins what it touches.
"""

from __future__ import annotations

from sparsefx.passes.channel_rules import (
    attention,
    convolution,
    elementwise,
    layout,
    normalization,
    pooling,
    products,
    recurrent,
    reductions,
    selection,
    windows,
)
from sparsefx.passes.channels.propagation import Rule

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **layout.RULES,
    **selection.RULES,
    **convolution.RULES,
    **products.RULES,
    **normalization.RULES,
    **pooling.RULES,
    **reductions.RULES,
    **attention.RULES,
    **recurrent.RULES,
    **windows.RULES,
}
"""Rules by the name of the op without overload; an in-place op has the rule of its plain form."""
