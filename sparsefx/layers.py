"""The layer types that are known by type: which of their parameters are weights, and how they read them.

    type                        parameters                                   op                reduction axis
    nn.Linear                   weight                                       linear            1
    nn.Conv1d/2d/3d             weight                                       conv1d/2d/3d      1 (within a group)
    nn.ConvTranspose1d/2d/3d    weight                                       conv_transpose..  0 (within a group)
    nn.MultiheadAttention       in_proj_weight, q/k/v_proj_weight            multi_head_..     1 (out_proj is an nn.Linear)
    nn.LSTM, nn.GRU, nn.RNN     weight_ih_*, weight_hh_*, weight_hr_*        lstm, gru, rnn    1
    nn.LSTMCell, GRUCell, ...   weight_ih, weight_hh                         lstm_cell, ...    1
    transformers' Conv1D        weight, [in, out]                            addmm             0

A subclass counts as its base only while it runs the base's own forward: weight standardisation and fake quantisation are
subclasses that read another weight than the parameter. Everything else is known by its uses alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class KnownWeight:
    """A weight of a known layer type: its local name, the layer's kind, and how the layer reads it."""

    local_name: str
    kind: str
    op: str
    reduction_axis: int
    groups: int = 1


_CONVOLUTIONS: dict[type[nn.Module], str] = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
_TRANSPOSED: dict[type[nn.Module], str] = {
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
_RECURRENT: dict[type[nn.Module], str] = {
    nn.LSTM: "lstm",
    nn.GRU: "gru",
    nn.RNN: "rnn",
    nn.LSTMCell: "lstm_cell",
    nn.GRUCell: "gru_cell",
    nn.RNNCell: "rnn_cell",
}
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def known_weights(module: nn.Module) -> Iterator[KnownWeight]:
    """The weights of ``module`` itself (not of its children), where its type is in the table."""
    base = known_base(module)
    if base is None:
        return
    if base in _RECURRENT:
        for name in recurrent_weight_names(module):
            yield KnownWeight(name, f"{base.__name__}.{name}", _RECURRENT[base], 1)
    elif base is nn.MultiheadAttention:
        for name in _ATTENTION_WEIGHTS:
            if module._parameters.get(name) is not None or is_computed(module, name):
                yield KnownWeight(name, f"MultiheadAttention.{name}", "multi_head_attention_forward", 1)
    elif base in _CONVOLUTIONS:
        yield KnownWeight("weight", base.__name__, _CONVOLUTIONS[base], 1, _groups(module))
    elif base in _TRANSPOSED:
        yield KnownWeight("weight", base.__name__, _TRANSPOSED[base], 0, _groups(module))
    elif base is nn.Linear:
        yield KnownWeight("weight", "Linear", "linear", 1)
    else:
        yield KnownWeight("weight", "Conv1D", "addmm", 0)


def known_base(module: nn.Module) -> type[nn.Module] | None:
    """The type of the table that ``module`` is an instance of, or None."""
    for base in type(module).__mro__:
        if base in _BASES or _is_transformers_conv1d(base):
            known: type[nn.Module] = base
            return known
    return None


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a layer of the table computes what its base type computes, going by which forward it runs."""
    base = known_base(module)
    methods = ("forward", "_conv_forward") if base in _CONVOLUTIONS else ("forward",)
    if base is None or any(name in module.__dict__ for name in methods):
        return False
    return all(getattr(type(module), name) is getattr(base, name) for name in methods)


def is_computed(module: nn.Module, local_name: str) -> bool:
    """Whether a parametrization, or a hook in its older style, computes this weight. Does not compute it: that can change it."""
    if parametrize.is_parametrized(module, local_name):
        return True
    return local_name not in module._parameters and isinstance(module.__dict__.get(local_name), Tensor)


def recurrent_weight_names(module: nn.Module) -> list[str]:
    """Names of the matrices of a recurrent layer or cell, in its own order, parametrized ones included."""
    names: list[str] = getattr(module, "_flat_weights_names", ["weight_ih", "weight_hh"])
    return [name for name in names if name.startswith("weight_")]


def _groups(module: nn.Module) -> int:
    groups = module.groups
    assert isinstance(groups, int)
    return groups


def _is_transformers_conv1d(base: type) -> bool:
    # Known by name, so that transformers need not be there.
    return base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"


_BASES: frozenset[type[nn.Module]] = frozenset((nn.Linear, nn.MultiheadAttention, *_CONVOLUTIONS, *_TRANSPOSED, *_RECURRENT))
