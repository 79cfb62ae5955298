"""Rung 3: torch.fx without inputs, in as few and as large parts as the model allows."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import fx, nn

from sparsefx.capture.state import unchanged
from sparsefx.layers import known_base


class PartTracer(fx.Tracer):
    """Traces through layers down to their functional calls, and keeps a submodule that resists as a leaf.

    Linear and convolution layers are looked into, so that every use of a weight is a node of the same kind
    whether it came from a layer or from ``F.linear(x, self.w)``. Other layers of torch.nn without children (norms,
    activations, pooling, recurrent layers) and attention stay whole: their forward branches on its input.
    """

    def __init__(self, autowrap_modules: tuple[ModuleType, ...] = ()) -> None:
        # Releases of torch before 2.15 say that there is exactly one module.
        super().__init__(autowrap_modules=autowrap_modules)  # type: ignore[arg-type, unused-ignore]
        self.resisting: list[tuple[str, nn.Module, str]] = []
        self._names: dict[int, str] = {}
        self._reads: dict[str, fx.Proxy] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._names = {id(parameter): name for name, parameter in root.named_parameters()}
        self._reads = {}
        return super().trace(root, concrete_args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # The base class searches all parameters at each read, and keeps reads that were erased with a module that resisted.
        name = self._names.get(id(attr_val)) if isinstance(attr_val, nn.Parameter) else None
        if name is None:
            return attr_val
        if name not in self._reads:
            self._reads[name] = self.create_proxy("get_attr", name, (), {})
        return self._reads[name]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        base = known_base(m)
        if base is not None and _looked_into(base):
            return False
        whole = base is not None or not m._modules
        return whole and m.__module__.startswith("torch.nn") and not isinstance(m, (nn.Sequential, nn.ModuleList))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)))
        count = len(self.resisting)
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:  # the user's forward, which may raise anything when it meets a Proxy
            self.module_stack = stack
            self._erase_after(last)
            # What resisted inside is looked at again when the module is traced on its own.
            del self.resisting[count:]
            self.resisting.append((path, m, _first_line(error)))
            return self.create_proxy("call_module", path, args, kwargs)

    def _erase_after(self, last: fx.Node) -> None:
        """Undo a half-traced module, and forget the reads of parameters that go with it."""
        erased: set[fx.Node] = set()
        while (node := next(iter(reversed(self.graph.nodes)))) is not last:
            self.graph.erase_node(node)
            erased.add(node)
        self._reads = {name: proxy for name, proxy in self._reads.items() if proxy.node not in erased}


def trace_parts(model: nn.Module) -> tuple[dict[str, fx.GraphModule], list[str]]:
    """Graphs by module path, and the reasons of the modules that could not be traced themselves.

    ``""`` is the whole model, where it can be traced; below a module that resists, its children are traced on their own.
    The graphs hold the model's own Parameters. The model is as before.
    """
    graphs: dict[str, fx.GraphModule] = {}
    reasons: list[str] = []
    visited: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", model)]
    with unchanged(model):
        while pending:
            path, module = pending.pop()
            if id(module) in visited:
                continue
            visited.add(id(module))
            tracer = PartTracer()
            try:
                graph = tracer.trace(module)
                graphs[path] = fx.GraphModule(module, graph, class_name=type(module).__name__)
            except Exception as error:  # as above
                reasons.append(f"torch.fx: {path or type(module).__name__}: {_first_line(error)}")
                pending += _children(path, module)
                continue
            for local_path, resisting, reason in tracer.resisting:
                full = f"{path}.{local_path}" if path else local_path
                reasons.append(f"torch.fx: {full}: {reason}")
                pending += _children(full, resisting)
    return graphs, reasons


def _children(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children to trace on their own, first one last; lists and dicts of modules have no forward, their items do."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += reversed(_children(full, child))
        elif any(True for _ in child.parameters()):
            found.append((full, child))
    return found[::-1]


def _looked_into(base: type[nn.Module]) -> bool:
    return base is nn.Linear or base.__name__.startswith(("Conv1", "Conv2", "Conv3", "ConvTranspose"))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


__all__ = ["PartTracer", "trace_parts"]
