"""Run a model for capture and comparison, and leave it exactly as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set)


@contextmanager
def preserved(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Put ``model`` in eval mode without gradients; on the way out restore all that running it may have changed.

    Restored, also after an exception: every module's attributes, registries and mode, the buffers' values, the
    random generators of torch, numpy and Python, the gradient mode, and torch's fused-attention switch. Parameters are
    not copied: a forward in eval mode does not write to them.

    Yields:
        A function that restores the buffers and attributes now, so that each run starts from the same state.
    """
    saved = [(module, dict(module.__dict__), _containers(module)) for module in model.modules()]
    tensors = _tensors(model)
    copies = [tensor.detach().clone() for tensor in tensors]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - what a model may draw from
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    fastpath = torch.backends.mha.get_fastpath_enabled()
    evaluating = False

    def restore() -> None:
        for module, attributes, containers in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in containers:
                if container != content or list(container) != list(content):
                    _refill(container, content)
            if evaluating:
                module.__dict__["training"] = False
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)

    with torch.random.fork_rng(devices=devices):
        try:
            # The fused path of nn.TransformerEncoderLayer is one opaque op, which no exporter translates.
            torch.backends.mha.set_fastpath_enabled(False)
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
                model.eval()
                evaluating = True
                yield restore
        finally:
            evaluating = False
            restore()
            torch.backends.mha.set_fastpath_enabled(fastpath)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Every plain container among the module's attributes with a shallow copy of its content."""
    return [(value, value.copy()) for value in module.__dict__.values() if isinstance(value, _CONTAINERS)]


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Buffers and tensors held as plain attributes, each once; parameters left out."""
    found: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                found[id(value)] = value
    return list(found.values())
