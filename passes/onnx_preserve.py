"""Run a model for capture and comparison, and leave it exactly as it was."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


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
    modes: list[bool] = []  # of each module while the model is ours; empty before and after

    def restore() -> None:
        for module, attributes, containers in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in containers:
                if not _same(container, content):
                    _refill(container, content)
        for (module, *_), mode in zip(saved, modes, strict=False):
            module.training = mode
            module.__dict__.pop("_compiled_call_impl", None)  # a compiled forward hides what is to be captured
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
                modes = [module.training for module, *_ in saved]
                restore()
                yield restore
        finally:
            modes = []
            restore()
            torch.backends.mha.set_fastpath_enabled(fastpath)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Every plain container among the module's attributes with a shallow copy of its content."""
    return [(value, value.copy()) for value in module.__dict__.values() if type(value) in _CONTAINERS]


def _same(container: Any, content: Any) -> bool:
    """Whether both hold the very same objects in the same order; equality would compare tensors."""
    if isinstance(container, dict):
        return _same(list(container), list(content)) and _same(list(container.values()), list(content.values()))
    if isinstance(container, set):
        return bool(container == content)
    return len(container) == len(content) and all(one is other for one, other in zip(container, content, strict=True))


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
