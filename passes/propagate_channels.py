"""Follows channels through the ATen graph: which belong together, which are constant, and who reads them.

An abstract interpretation. Each tensor has a `Value`: labels tell whose channel each element is, constants what an element is
whatever the inputs are. Ops on the layout are carried out on labels as they are on elements, so that coupling follows
index maps and never names. An op without a rule pins what it touches, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from sparsefx.passes.channel_rules import RULES
from sparsefx.passes.channels.graph import ChannelGraph
from sparsefx.passes.channels.propagation import Propagation, Rule


def propagate_channels(
    model: nn.Module,
    graphs: Sequence[ChannelGraph],
    progress: Callable[[int], None] | None = None,
    *,
    rules: Mapping[str, Rule] = RULES,
    only_zeros: bool = False,
) -> Propagation:
    """Interpret the graphs of one model, which share labels through its parameters.

    Args:
        model: what the graphs were captured from.
        graphs: captured runs of it.
        progress: called with 1 after each node.
        rules: what ops make of channels; the default is for their removal.
        only_zeros: whether constants other than zero count as unknown.
    """
    propagation = Propagation(rules, only_zeros=only_zeros)
    for graph in graphs:
        propagation.follow(graph, progress)
    _pin_attention_modules(model, propagation)
    _pin_mixed_uses(propagation)
    return propagation


def _pin_attention_modules(model: nn.Module, propagation: Propagation) -> None:
    """nn.MultiheadAttention cuts its embedding into heads by numbers of its own, which also are the width of its input."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        own = {f"{path}.{name}" if path else name for name, _ in module.named_parameters()}
        for (name, axis), labels in list(propagation.facts.axes.items()):
            if name in own and not (name.endswith("out_proj.weight") and axis == 0):
                told = "nn.MultiheadAttention has one width for its heads and its input"
                propagation.pin_labels(labels, told, path, ordered=False)


def _pin_mixed_uses(propagation: Propagation) -> None:
    """A weight whose axes are channels in one place and that is used element by element, or in groups, in another."""
    facts = propagation.facts
    for (name, axis), labels in list(facts.axes.items()):
        if name in facts.elements:
            propagation.pin_labels(facts.elements[name], "it is used in two ways", name)
            propagation.pin_labels(labels, "it is used in two ways", name)
        if name in facts.gathered and axis == 1:
            propagation.pin_labels(facts.gathered[name][0], "it is used with and without groups", name)
            propagation.pin_labels(facts.gathered[name][1], "it is used with and without groups", name)
            propagation.pin_labels(labels, "it is used with and without groups", name)
