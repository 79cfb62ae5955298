"""Rung 1: torch.export of the whole model, as a graph over the model's own Parameters and buffers."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn

from sparsefx.capture.caches import caches, without_caches
from sparsefx.capture.graph_uses import attribute
from sparsefx.capture.state import unchanged


def export_graph(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """The ATen graph of ``model`` on these inputs, in the mode (train or eval) that it is in; it is called like the model.

    Parameters and buffers of the graph are the very tensors of the model. Of a model that returns a cache of keys and values
    (``config.use_cache``) which torch.export refuses, the graph is the one without that cache among its outputs. Whatever
    torch.export raises goes through; the model is as before in every case.
    """
    with unchanged(model), _quiet():
        exported = exported_program(model, args, kwargs).module()
    _share_tensors(exported, model)
    graph_module = fx.GraphModule(exported, exported.graph, class_name=type(model).__name__)
    graph_module.meta = {}
    graph_module.graph.eliminate_dead_code(is_impure_node=_keep)
    graph_module.recompile()
    graph_module.training = model.training
    return graph_module


def exported_program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    """What torch.export makes of ``model`` on these inputs, without a cache among its outputs where that is refused."""
    with unchanged(model), _quiet():
        try:
            return torch.export.export(model, args, kwargs, strict=False)
        except Exception:  # export may raise anything; without caches to leave out, it goes on to the caller
            if not caches(model):
                raise
            # The usual reason with transformers: the output holds a cache object, which is no tensor structure.
            with without_caches(model):
                return torch.export.export(model, args, kwargs, strict=False)


def _share_tensors(exported: nn.Module, model: nn.Module) -> None:
    """Put the model's own tensors where export made copies: a graph over copies would train beside the model."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        _put(exported, name, parameter, "_parameters")
    for name, buffer in model.named_buffers(remove_duplicate=False):
        _put(exported, name, buffer, "_buffers")


def _put(root: nn.Module, name: str, tensor: torch.Tensor, kind: str) -> None:
    path, _, local_name = name.rpartition(".")
    owner = attribute(root, path) if path else root
    if isinstance(owner, nn.Module):
        slots: dict[str, torch.Tensor] = getattr(owner, kind)
        if local_name in slots and slots[local_name] is not tensor:
            slots[local_name] = tensor


def _keep(node: fx.Node) -> bool:
    # Reading a parameter that nothing uses is all that goes: placeholders are the signature, and an op may have an effect.
    return node.op != "get_attr"


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs and prints what it refuses, graph and all, although it raises too; the next rung is the answer."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx", "torch._subclasses")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
