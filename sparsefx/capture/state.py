"""Leaves a model exactly as it was, whatever its forward did while it was being captured.

Tracing runs the user's code with stand-ins for tensors. A forward that keeps something (``self.cache = x``, a list it
appends to, batch statistics, ``num_batches_tracked``) would be left holding stand-ins; one that draws random numbers would
move the generators.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Within this context the model may be run or traced; afterwards it and the random generators are as before.

    Restored: each module's attributes (one may be rebound, added, deleted; lists, dicts and sets in it changed), training
    flags, hooks, buffers by identity and by value, gradients and ``requires_grad``; the generators of torch (CPU and the
    devices in use), Python and NumPy. Warnings of the code that runs inside are not shown.

    Args:
        model: what may change.
        parameters: copy the values of the parameters too. Needed where real tensors run through the model.
    """
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    containers: dict[int, tuple[Any, Any]] = {}
    tensors: dict[int, tuple[Tensor, Tensor]] = {}
    for _, values in attributes:
        for value in values.values():
            _remember(value, containers, tensors, parameters)
    gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    generators = _generator_states()
    for module in model.modules():
        module.__dict__.pop("_compiled_call_impl", None)  # `module.compile()` would hide what is to be captured
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, values in attributes:
            if _differs(module.__dict__, values):
                module.__dict__.clear()
                module.__dict__.update(values)
        for container, copy in containers.values():
            _restore_container(container, copy)
        with torch.no_grad():
            for tensor, copy in tensors.values():
                if not _same_values(tensor, copy):
                    tensor.data.copy_(copy)
        for parameter, gradient, requires_grad in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        _restore_generators(generators)


def _differs(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return list(now) != list(before) or any(now[key] is not before[key] for key in before)


def _remember(value: Any, containers: dict[int, tuple[Any, Any]], tensors: dict[int, tuple[Tensor, Tensor]], all_: bool) -> None:
    """Copy what could be changed in place below ``value``: built-in containers, and tensors in them."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            if id(item) not in tensors and _copyable(item) and (all_ or not isinstance(item, nn.Parameter)):
                tensors[id(item)] = (item, item.detach().clone())
        elif isinstance(item, (list, dict, set, deque)) and id(item) not in containers:
            containers[id(item)] = (item, item.copy())
            pending.extend(item.values() if isinstance(item, dict) else item)
        elif type(item) is tuple:
            pending.extend(item)


def _copyable(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.device.type != "meta" and tensor.layout == torch.strided


def _restore_container(container: Any, copy: Any) -> None:
    if isinstance(container, dict):
        if _differs(container, copy):
            container.clear()
            container.update(copy)
    elif isinstance(container, list):
        if len(container) != len(copy) or any(a is not b for a, b in zip(container, copy, strict=True)):
            container[:] = copy
    elif isinstance(container, deque):
        if len(container) != len(copy) or any(a is not b for a, b in zip(container, copy, strict=True)):
            container.clear()
            container.extend(copy)
    elif container != copy:
        container.clear()
        container.update(copy)


def _same_values(tensor: Tensor, copy: Tensor) -> bool:
    if tensor.shape != copy.shape or tensor.dtype != copy.dtype:
        return False
    # NaN differs from itself and is then copied again, which does no harm.
    return torch.equal(tensor.detach(), copy)


def _generator_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state()
    return states


def _restore_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])
