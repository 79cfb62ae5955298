"""Run a model and look at the inputs of chosen weights, wherever in its code they are used."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparsefx.capture.arguments import copies
from sparsefx.capture.state import unchanged
from sparsefx.one_shot.layout import Call, as_call

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_ATTENTION = inspect.signature(functional.multi_head_attention_forward)


class Stop(BaseException):
    """Ends a run whose rest is of no interest; not an Exception, so that a model's own handlers let it pass."""


class _Watch(TorchFunctionMode):
    def __init__(self, weights: Mapping[int, str], see: Callable[[str, Call], None]) -> None:
        super().__init__()
        self._weights, self._see = weights, see

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        calls = [as_call(func, args, kwargs)]
        if func is functional.multi_head_attention_forward:
            calls = [*_attention_calls(args, kwargs, self._weights)]
        for call in calls:
            if call is not None and id(call.weight) in self._weights:
                self._see(self._weights[id(call.weight)], call)
        return func(*args, **kwargs)


def _attention_calls(args: tuple[Any, ...], kwargs: dict[str, Any], weights: Mapping[int, str]) -> Iterator[Call]:
    """The products inside torch's attention function, which runs where no mode sees them.

    One projection of three different inputs at once is none of them: its rows do not share an input.
    """
    bound = _ATTENTION.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    query, key, value, joint = (given[name] for name in ("query", "key", "value", "in_proj_weight"))
    if given["use_separate_proj_weight"]:
        for inputs, name in ((query, "q_proj_weight"), (key, "k_proj_weight"), (value, "v_proj_weight")):
            yield Call(inputs, given[name])
    elif joint is not None and query is key and key is value:
        yield Call(query, joint)
    out = given["out_proj_weight"]
    if id(out) in weights:
        # With the identity for the last projection, what comes out is what enters it.
        identity = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)
        given.update(out_proj_weight=identity, out_proj_bias=None)
        yield Call(functional.multi_head_attention_forward(*bound.args, **bound.kwargs)[0], out)


@contextmanager
def watching(model: nn.Module) -> Iterator[None]:
    """Within this context attention runs as plain operations; torch's switch is put back afterwards."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run(model: nn.Module, inputs: Inputs, weights: Mapping[int, str], see: Callable[[str, Call], None]) -> None:
    """Run the model once in eval mode without gradients, and ``see(name, call)`` each product with one of the weights.

    Args:
        model: left as it was but for what ``see`` does.
        inputs: positional and keyword arguments.
        weights: full names by the parameters' ids.
        see: may raise `Stop` to end the run.
    """
    with unchanged(model), torch.no_grad(), watching(model):
        model.eval()
        args, kwargs = copies(*inputs)
        try:
            with _Watch(weights, see):
                model(*args, **kwargs)
        except Stop:
            return
