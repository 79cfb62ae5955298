"""Whether a model and its graph compute the same: outputs, gradients and buffers, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def _computed(
    model: nn.Module, runs: nn.Module, args: Any, kwargs: Any
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, gradients of all parameters, and the state afterwards; the state is put back."""
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        outputs = [leaf for leaf in tree_leaves(runs(*args, **kwargs)) if isinstance(leaf, Tensor)]
    differentiable = [leaf.double().square().sum() for leaf in outputs if leaf.requires_grad]
    assert differentiable
    torch.stack(differentiable).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(saved[name])
    return [leaf.detach() for leaf in outputs], gradients, state


def assert_same_computation(model: nn.Module, graph_module: nn.Module, args: Any, kwargs: Any) -> None:
    """One forward and backward of each; every output, gradient and buffer has the same bits."""
    outputs, gradients, state = _computed(model, model, args, kwargs)
    graph_outputs, graph_gradients, graph_state = _computed(model, graph_module, args, kwargs)
    assert len(outputs) == len(graph_outputs) > 0
    assert all(torch.equal(a, b) for a, b in zip(outputs, graph_outputs, strict=True)), "outputs differ"
    assert gradients.keys() == graph_gradients.keys()
    assert [name for name in gradients if not torch.equal(gradients[name], graph_gradients[name])] == []
    assert [name for name in state if not torch.equal(state[name], graph_state[name])] == []
