"""Follows channels through the ATen graph: which belong together, which are constant, and who reads them.

An abstract interpretation. Each tensor has a `Value`: labels tell whose channel each element is, constants what an element is
whatever the inputs are. Ops on the layout are carried out on labels as they are on elements, so that coupling follows
index maps and never names. An op without a rule pins what it touches, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparsefx.passes.channel_rules import RULES
from sparsefx.passes.channels.graph import ChannelGraph
from sparsefx.passes.channels.propagation import Propagation


def propagate_channels(graphs: Sequence[ChannelGraph], progress: Callable[[int], None] | None = None) -> Propagation:
    """Interpret the graphs of one model, which share labels through its parameters.

    Args:
        graphs: captured runs of the same model.
        progress: called with 1 after each node.
    """
    propagation = Propagation(RULES)
    for graph in graphs:
        propagation.follow(graph, progress)
    return propagation
