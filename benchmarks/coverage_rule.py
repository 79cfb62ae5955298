"""What the paper's rule allows of a model, found without sparsefx: the rule and the FLOPs by a second, independent route.

Rule ("Advances in Sparse Neural Model Training", appendix B): convolutions and linear layers, except those whose input channels
(of a group) are not divisible by 16; no embeddings, vocabulary projections, classification heads of language models.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.zoo import Case

aten = torch.ops.aten
_PRODUCTS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.bmm: (0, 1), aten.baddbmm: (1, 2)}


@dataclass
class RuleCount(TorchDispatchMode):
    """Notes the FLOPs of every convolution and matrix product of a run, below autograd, by the parameter that it reads.

    Attributes:
        flops: by ``id`` of the parameter: two for each multiply-add, batch included.
        reduction: by ``id``, how many inputs one output of a group sums over, without the kernel's positions.
        computed: FLOPs of convolutions by a weight that is no parameter (standardised, generated): the rule, which is about
            parameters, does not speak of them. Products of two activations are not counted.
    """

    by_storage: dict[int, nn.Parameter]
    flops: dict[int, int] = field(default_factory=dict)
    reduction: dict[int, int] = field(default_factory=dict)
    computed: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is aten.convolution:
            inputs, weight, transposed, groups = args[0], args[1], args[6], args[8]
            positions = inputs.shape[2:] if transposed else result.shape[2:]
            products = 2 * inputs.shape[0] * math.prod(positions) * weight.numel()
            parameter = self.by_storage.get(weight.untyped_storage().data_ptr())
            if parameter is None:
                self.computed += products
            else:
                self._add(parameter, products, weight.shape[0] // groups if transposed else weight.shape[1])
        elif packet is aten.mkldnn_rnn_layer:
            for weight in args[1:3]:
                parameter = self.by_storage.get(weight.untyped_storage().data_ptr())
                if parameter is not None:
                    self._add(parameter, 2 * args[0].shape[0] * args[0].shape[1] * weight.numel(), weight.shape[1])
        elif packet in _PRODUCTS or "grouped_mm" in str(packet):
            for side, position in enumerate(_PRODUCTS.get(packet, (0, 1))):
                operand = args[position]
                parameter = self.by_storage.get(operand.untyped_storage().data_ptr())
                other = args[_PRODUCTS.get(packet, (0, 1))[1 - side]]
                if parameter is not None and parameter.ndim >= 2 and not _is_one_hot(other, -1 if side else -2):
                    reduced = operand.shape[-1 if side == 0 else -2]
                    self._add(parameter, 2 * result.numel() * reduced, reduced)
        return result

    def _add(self, parameter: nn.Parameter, products: int, reduced: int) -> None:
        self.flops[id(parameter)] = self.flops.get(id(parameter), 0) + products
        self.reduction[id(parameter)] = reduced


def _is_one_hot(operand: Tensor, axis: int) -> bool:
    """Whether every vector along the axis is a one among zeros, read from the values: the product is a lookup of rows."""
    return operand.shape[axis] > 1 and bool(((operand == 0) | (operand == 1)).all() and (operand.sum(axis) == 1).all())


def count(case: Case, model: nn.Module) -> RuleCount:
    """Run the model once in eval mode, as the coverage run does, and count."""
    storages = {p.untyped_storage().data_ptr(): p for p in model.parameters() if p.numel()}
    counter = RuleCount(storages)
    model.eval()
    torch.manual_seed(1)
    args, kwargs = case.call()
    # With gradients: without them torch replaces whole encoder layers by one fused op.
    with torch.enable_grad(), counter:
        model(*args, **kwargs)
    return counter


def allowed(case: Case, model: nn.Module, counter: RuleCount) -> set[str]:
    """Names of the parameters that the rule lets be sparse."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = set()
    for key, reduced in counter.reduction.items():
        name = names[key]
        trains = parameters[name].requires_grad  # what the user has frozen is not trained, sparse or dense
        if reduced % 16 == 0 and trains and key not in embedded and not _is_head(name, case.heads):
            found.add(name)
    return found


def _is_head(name: str, heads: Collection[str]) -> bool:
    return any(fnmatchcase(name.rpartition(".")[0], pattern) for pattern in heads)
