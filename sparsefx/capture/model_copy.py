"""Copies of models in whatever state training left them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from sparsefx.capture.below import below
from sparsefx.errors import StateError

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """``copy.deepcopy`` that also takes models that keep what a training step computed.

    Tensors that are part of an autograd graph, such as an activation that forward keeps or the weight that weight norm's hook
    leaves behind, are copied without it; ``copy.deepcopy`` itself refuses them.

    Args:
        model: is not changed.
        memo: copies to be taken for these objects, by identity.

    Raises:
        StateError: a module holds something else that cannot be copied; the message names it.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in _held(module).values():
            for tensor in _computed(value):
                if id(tensor) not in memo:
                    memo[id(tensor)] = tensor.detach().clone()
    before = dict(memo)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the objects that a module holds raise
        told = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise StateError(
            f"{type(model).__name__} cannot be copied, since {_culprit(model, before)} cannot ({told}); delete it, or detach "
            "what it keeps of the last step, and try again"
        ) from error


def _held(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in ("_parameters", "_modules")}


def _computed(value: Any) -> Iterator[Tensor]:
    """Tensors below a value that are no leaves of an autograd graph."""
    return (item for item in below(value, contents=_held_inside) if isinstance(item, Tensor) and not item.is_leaf)


def _held_inside(item: Any) -> list[Any] | None:
    return [held for module in item.modules() for held in _held(module).values()] if isinstance(item, nn.Module) else None


def _culprit(model: nn.Module, memo: dict[int, Any]) -> str:
    """The attribute that cannot be copied, as code would write it."""
    for path, module in model.named_modules():
        for name, value in _held(module).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # the one that is looked for
                return repr(f"{path}.{name}" if path else name)
    return "one of its modules"


__all__ = ["copy_model"]
