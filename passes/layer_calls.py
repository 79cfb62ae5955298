"""What each layer of a model is called with in one run, and whether anything but the layer itself reads its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from sparsefx.capture.arguments import copies, describe_arguments
from sparsefx.capture.state import unchanged
from sparsefx.errors import CaptureError


@dataclass(eq=False)
class LayerCalls:
    """The calls of one layer.

    Attributes:
        inputs: of each call its only argument, without values (on the meta device, strides kept).
        problem: why the layer cannot be replaced by one that holds no dense weight; empty where it can.
    """

    inputs: list[Tensor] = field(default_factory=list)
    problem: str = ""


def observe_layer_calls(
    model: nn.Module, layers: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, LayerCalls]]:
    """Run ``model`` once, without gradients and in the mode that it is in, and note the calls of ``layers``.

    Args:
        model: is as before afterwards.
        layers: paths of modules with a parameter ``weight``.
        args, kwargs: what to call the model with.

    Returns:
        The model's output, and the calls by path.

    Raises:
        CaptureError: the model raises on these inputs.
    """
    calls = {name: LayerCalls() for name in layers}
    modules = {name: model.get_submodule(name) for name in layers}
    reader = _Reader(modules, calls)
    with unchanged(model):
        handles = []
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(_entering(calls[name], reader), with_kwargs=True))
            handles.append(module.register_forward_hook(_leaving(reader), always_call=True))
        try:
            own_args, own_kwargs = copies(args, kwargs)
            with torch.no_grad(), reader:
                output = model(*own_args, **own_kwargs)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} was given example inputs {describe_arguments(args, kwargs)} and raised "
                f"{type(error).__name__}: {error}. Pass inputs that the model accepts, on its device and in its dtype"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    for path, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Seen by no observer: in eval mode it hands all its weights to one fused kernel where nothing looks on.
            for local_name in ("linear1", "linear2"):
                name = f"{path}.{local_name}" if path else local_name
                if name in calls and not calls[name].problem:
                    calls[name].problem = "nn.TransformerEncoderLayer reads its weight itself, in the fused kernel of eval mode"
    return output, calls


def _entering(calls: LayerCalls, reader: _Reader) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reader.inside.append(module)
        given = [*args, *kwargs.values()]
        if len(given) == 1 and isinstance(given[0], Tensor):
            data = given[0]
            calls.inputs.append(torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device="meta"))
        elif not calls.problem:
            calls.problem = f"it is called with {len(given)} arguments, and a compressed layer takes one tensor"

    return hook


def _leaving(reader: _Reader) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        reader.inside.pop()

    return hook


class _Reader(TorchFunctionMode):
    """Notes the functions that read a layer's weight while that layer is not running."""

    def __init__(self, modules: dict[str, nn.Module], calls: dict[str, LayerCalls]) -> None:
        super().__init__()
        self.inside: list[nn.Module] = []
        # Layers that share one weight may each read it.
        self._owners: dict[int, list[nn.Module]] = {}
        self._calls: dict[int, list[LayerCalls]] = {}
        for name, module in modules.items():
            self._owners.setdefault(id(module.weight), []).append(module)
            self._calls.setdefault(id(module.weight), []).append(calls[name])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            owners = self._owners.get(id(leaf))
            if owners is None or (self.inside and any(self.inside[-1] is owner for owner in owners)):
                continue
            reader = resolve_name(func) or getattr(func, "__name__", str(func))
            for calls in self._calls[id(leaf)]:
                calls.problem = calls.problem or f"{reader} reads its weight outside the layer, which then has none"
        return func(*args, **(kwargs or {}))
