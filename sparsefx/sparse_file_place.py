"""Put what was read from a file into a model, and put everything back where that fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx import checkpoint
from sparsefx.dormant_values import compact_of
from sparsefx.errors import OptionError, StateError
from sparsefx.model_record import ModelRecord, forget, set_model_record
from sparsefx.runtime import MaskRuntime
from sparsefx.sparse_file_content import algorithm_of, model_record_of, pattern_of
from sparsefx.sparse_file_read import SavedParameter
from sparsefx.sparse_parameter import SparseParameter, add_record, sparse_parameters

_MOVED = ("density", "target", "threshold", "merged", "left_out")


@dataclass(eq=False)
class Plan:
    """What is to be put where: checked, and not done yet.

    Attributes:
        state: values by state_dict name.
        parameters: masks to put beside parameters, by full name.
        new: records to add, where the model has none.
        models: records of whole models to add, by module name.
        missing, unexpected: names on one side only.
    """

    state: dict[str, Any]
    parameters: dict[str, SavedParameter]
    new: dict[str, SparseParameter]
    models: dict[str, ModelRecord]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        state: dict[str, Any],
        parameters: dict[str, SavedParameter],
        models: list[dict[str, Any]],
        tensors: Mapping[str, Tensor],
        missing: tuple[str, ...],
        unexpected: tuple[str, ...],
    ) -> Plan:
        """Make the records that a dense model is to get. Raises StateError where the file names what is not known here."""
        new: dict[str, SparseParameter] = {}
        if models:
            own = dict(model.named_parameters(remove_duplicate=False))
            for name, saved in parameters.items():
                if name not in own:
                    raise StateError(f"the file has a mask for {name}, which is a buffer here; expected a parameter")
                weight = model.get_parameter(name).detach()
                mask = torch.empty_like(weight, dtype=torch.bool).copy_(saved.mask)
                new[name] = SparseParameter(
                    pattern=pattern_of(saved.pattern),
                    density=saved.density,
                    reduction_axis=saved.reduction_axis,
                    mask=mask,
                    compact=None if saved.dormant is None else compact_of(saved.dormant.to(weight), mask),
                    algorithm=algorithm_of(saved.algorithm),
                    target=saved.target,
                )
        records: dict[str, ModelRecord] = {}
        for text in models:
            record = model_record_of(text, tensors)
            prefix = f"{text['module']}." if text["module"] else ""
            present = tuple(row for row in record.layers if not row.sparse or prefix + row.parameter in new)
            records[text["module"]] = replace(record, layers=present)
        return cls(state, parameters, new, records, missing, unexpected)


@torch.no_grad()
def place(model: nn.Module, plan: Plan, runtime: tuple[MaskRuntime, dict[str, Any]] | None) -> None:
    """Carry out ``plan``, then load the runtime's state. On failure the model is as before.

    Memory: a second copy of the weights that are loaded, until it is done.
    """
    before = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    copies = {name: value.clone() for name, value in before.items() if name in plan.state}
    records = [
        (
            record,
            record.mask.clone(),
            record.dormant,
            {k: getattr(record, k) for k in _MOVED},
        )
        for _, _, record in sparse_parameters(model)
    ]
    runtime_before = None if runtime is None else runtime[0].state_dict()
    try:
        for name, parameter, record in sparse_parameters(model):
            if name in plan.parameters:
                _move(record, parameter.detach(), plan.parameters[name])
        # Values that fit the mask keep it; all others get a mask of their own here.
        model.load_state_dict(plan.state, strict=False)
        for name, record in plan.new.items():
            module_name, _, local_name = name.rpartition(".")
            add_record(model.get_submodule(module_name), local_name, record)
        for module_name, model_record in plan.models.items():
            module = model.get_submodule(module_name)
            checkpoint.watch_loading(module)
            set_model_record(module, model_record)
        for name, parameter, record in sparse_parameters(model):
            if name in plan.parameters:
                parameter.detach().masked_fill_(~record.mask, 0)
        if runtime is not None:
            runtime[0].load_state_dict(runtime[1])
    except BaseException as error:
        if plan.new:
            forget(model)
        for name, copy in copies.items():
            before[name].copy_(copy)
        for record, mask, dormant, values in records:
            record.mask.copy_(mask)
            for key, value in values.items():
                setattr(record, key, value)
            if dormant is not None:
                record.keep(dormant)
        if runtime is not None and runtime_before is not None:
            runtime[0].load_state_dict(runtime_before)
        if isinstance(error, (RuntimeError, ValueError, TypeError, KeyError)):
            raise OptionError(f"the model refuses the values of the file: {error}; it is as before") from error
        raise


def _move(record: SparseParameter, weight: Tensor, saved: SavedParameter) -> None:
    record.settle(weight)
    record.follow(weight)
    record.mask.copy_(saved.mask)
    record.density, record.target, record.threshold, record.left_out = saved.density, saved.target, None, None
    record.keep(torch.zeros_like(weight) if saved.dormant is None else saved.dormant)
