"""Caches of keys and values among a model's outputs: objects that neither torch.export nor ONNX has a form for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def caches(model: nn.Module) -> list[Any]:
    """The configurations, in the style of transformers, that ask for a cache of keys and values."""
    configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
    return [config for config in configs.values() if getattr(config, "use_cache", None) is True]


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Within this context those configurations ask for none, and the model returns none."""
    configs = caches(model)
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True
