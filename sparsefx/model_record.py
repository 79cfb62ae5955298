"""What sparsefx remembers of a sparsified model as a whole, in the ``__dict__`` of its root module."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.checkpoint import unwatch_loading
from sparsefx.ops import sparse_training
from sparsefx.report import LayerReport
from sparsefx.sparse_parameter import SparseParameter, records_of, remove_records, sparse_parameters

_KEY = "_sparsefx_model"


@dataclass(eq=False)
class ModelRecord:
    """The choices made by ``sparsify``.

    Attributes:
        pattern: name of the pattern.
        density: share of weights that participate, as asked for.
        algorithm: name of the algorithm.
        layers: the decisions on every Linear/Conv, as they were at sparsify.
        unseen: parameters that look like weights and were seen by no call.
        inputs: zeros in the shapes of the example inputs, or None; what `graph` captures with.
        attached: whether a runtime follows some parameters.
        warned: whether training without a runtime was warned of.
        watched: the parameters whose gradients are watched for that.
    """

    pattern: str
    density: float
    algorithm: str
    layers: tuple[LayerReport, ...]
    unseen: tuple[str, ...]
    inputs: Any = None
    attached: bool = False
    warned: bool = False
    watched: list[tuple[weakref.ReferenceType[nn.Parameter], weakref.ReferenceType[SparseParameter]]] = field(
        default_factory=list, repr=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "attached": False, "warned": False, "watched": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRecord:
        """A copy that watches the copies of the parameters: those of a module are copied before this record is."""
        twin = ModelRecord(self.pattern, self.density, self.algorithm, self.layers, self.unseen, self.inputs)
        for parameter, sparse in self.watched:
            copies = memo.get(id(parameter())), memo.get(id(sparse()))
            if isinstance(copies[0], nn.Parameter) and isinstance(copies[1], SparseParameter):
                _watch(twin, copies[0], copies[1])
        return twin


def model_records(model: nn.Module) -> Iterator[tuple[nn.Module, ModelRecord]]:
    """The record of ``model``, and those of submodules that were sparsified on their own or later wrapped."""
    for module in model.modules():
        record = module.__dict__.get(_KEY)
        if record is not None:
            yield module, record


def set_model_record(model: nn.Module, record: ModelRecord) -> None:
    """Put ``record`` at ``model``, and watch for gradients that reach a masked parameter no runtime follows."""
    model.__dict__[_KEY] = record
    watch(model)


def watch(model: nn.Module) -> None:
    """Watch for gradients that reach masked parameters which no runtime follows, where that is not done already."""
    for module, record in model_records(model):
        for _, parameter, sparse in sparse_parameters(module):
            if sparse.runtime is None and sparse.warning is None:
                _watch(record, parameter, sparse)


def _watch(record: ModelRecord, parameter: nn.Parameter, sparse: SparseParameter) -> None:
    if parameter.requires_grad and parameter.is_leaf:
        sparse.warning = parameter.register_post_accumulate_grad_hook(_WarnUnattached(weakref.ref(record)))
        record.watched.append((weakref.ref(parameter), weakref.ref(sparse)))


def is_watch(hook: object) -> bool:
    """Whether a hook of a parameter is one of those that `watch` registers."""
    return isinstance(hook, _WarnUnattached)


def forget(model: nn.Module) -> None:
    """Take away all that was put beside the model: records of parameters and of models, the hooks on loading,
    warnings, training kernels."""
    for module in model.modules():
        for record in records_of(module).values():
            if record.warning is not None:
                record.warning.remove()
        remove_records(module)
    unwatch_loading(model)
    sparse_training.remove(model)
    for module, _ in list(model_records(model)):
        del module.__dict__[_KEY]


class _WarnUnattached:
    """Warns once a model: gradients arrive at masked parameters, and no runtime keeps them sparse."""

    def __init__(self, record: weakref.ReferenceType[ModelRecord]) -> None:
        self._record = record
        self._called = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, parameter: Tensor) -> None:
        record = self._record()
        if record is None or record.warned:
            return
        if record.attached and not self._called:
            # An optimizer that was given the parameter since is only seen at its next step.
            self._called = True
            return
        record.warned = True
        warnings.warn(
            "this model was sparsified and is being trained, but no MaskRuntime is attached to all of it: optimizer steps will "
            "fill masked weights. Call sparsefx.attach(model, optimizer, total_steps=...) before training",
            UserWarning,
            stacklevel=2,
        )


def has_records(model: nn.Module) -> bool:
    """Whether any parameter below ``model`` has a mask."""
    return any(records_of(module) for module in model.modules())
