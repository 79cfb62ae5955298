"""What happens when a state_dict is loaded into a sparsified model, whatever kind it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.coupled_records import couple_loaded
from sparsefx.dormant_values import compact_of
from sparsefx.loaded_densities import keep_whole
from sparsefx.ops.masks_of_shards import choose_of_shards
from sparsefx.ops.split import rewire_masks
from sparsefx.patterns import GlobalUnstructured
from sparsefx.sharded_records import share_out
from sparsefx.shards import anywhere, counts_of, is_distributed, totals, values_of
from sparsefx.sparse_parameter import SparseParameter, records_of, sparse_parameters


def watch_loading(model: nn.Module) -> None:
    """From now on, loading a state_dict into ``model``, or into a part of it, keeps its masked parameters sparse."""
    for module in model.modules():
        if records_of(module):
            module.register_load_state_dict_pre_hook(_before_loading)
            module.register_load_state_dict_post_hook(_after_loading)
    # The hooks of a module run after those of its children, so this one sees all layers loaded.
    model.register_load_state_dict_post_hook(_after_loading_all)


def unwatch_loading(model: nn.Module) -> None:
    """Undo `watch_loading`, in a copy or an unpickled model too (where the handles that torch gave are lost)."""
    ours = (_before_loading, _after_loading, _after_loading_all)
    for module in model.modules():
        for hooks in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in ours]:
                del hooks[key]


@torch.no_grad()
def adopt(record: SparseParameter, parameter: nn.Parameter) -> None:
    """Fit the mask to values that did not come from the runtime.

    Values that the mask already fits keep it, and the dormant values beside it: that is a resumed run, whose runtime state
    may have been loaded before. Any others get the mask that `sparsify` would choose for them, so that a sparse checkpoint
    is kept whole and a dense one loses its smallest weights; what does not participate becomes dormant. A mask cannot be
    chosen by NaN: there the present one stays, and the runtime, `finalize` and the export tell.
    """
    weight = values_of(parameter)
    if weight.is_meta:
        return
    record.settle(weight)
    if record.mask.is_meta:
        record.mask = torch.zeros_like(weight, dtype=torch.bool)
        record.compact = None if record.compact is None else compact_of(torch.zeros_like(weight), record.mask)
    record.follow(weight)
    # Of sharded parameters every process has to come to the same conclusion.
    if _leaves_out(record.mask, weight, record):
        if not anywhere(not bool(torch.isfinite(weight).all()), record.shards):
            record.remember_mask()
            record.mask.copy_(_mask_for(record, weight))
            record.threshold = None
        left_out = weight.masked_fill(record.mask, 0)
        record.keep(left_out)
        record.left_out = left_out if _leaves_out(record.mask, weight, record) else None
    weight.masked_fill_(~record.mask, 0)


def _leaves_out(mask: Tensor, weight: Tensor, record: SparseParameter) -> bool:
    return anywhere(bool((weight.masked_fill(mask, 0) != 0).any()), record.shards)


def _mask_for(record: SparseParameter, weight: Tensor) -> Tensor:
    if isinstance(record.pattern, GlobalUnstructured):
        return weight != 0  # the threshold is one over all layers: it is found when all are loaded
    if record.coupled is not None:  # likewise: whole filters of what was loaded
        others = [axis for axis in range(weight.dim()) if axis != 1 - record.reduction_axis]
        return (weight != 0).any(dim=others, keepdim=True).expand_as(weight)
    # The non-zeros of a sparse checkpoint stay, however small they are beside the others.
    whole = _best(record, (weight != 0).to(torch.float32))
    return whole if not _leaves_out(whole, weight, record) else _best(record, weight)


def _best(record: SparseParameter, scores: Tensor) -> Tensor:
    if record.shards is None:
        return record.pattern.mask(scores, record.density, reduction_axis=record.reduction_axis)
    chosen = replace(record, mask=torch.empty_like(record.mask))
    choose_of_shards([([chosen], [scores], record.density)])
    return chosen.mask


def _before_loading(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: Any, missing: Any, odd: Any, errors: Any
) -> None:
    for local_name, record in records_of(module).items():
        record.loading = state_dict.get(prefix + local_name)


@torch.no_grad()
def _after_loading(module: nn.Module, incompatible_keys: Any) -> None:
    for local_name, record in records_of(module).items():
        parameter, loaded = module._parameters.get(local_name), record.loading
        record.loading = None
        if parameter is None or loaded is None:
            continue
        if is_distributed(parameter):
            share_out(module)
        elif parameter.device == loaded.device and parameter.data_ptr() == loaded.data_ptr() and not parameter.is_meta:
            parameter.data = parameter.detach().clone()  # load_state_dict(assign=True): the caller's tensor stays as it is
        record.merged = False
        adopt(record, parameter)


@torch.no_grad()
def _after_loading_all(model: nn.Module, incompatible_keys: Any) -> None:
    """What one layer alone could not tell: another name of a tied parameter was loaded last, or one threshold over all."""
    share_out(model)
    for _, parameter, record in sparse_parameters(model):
        adopt(record, parameter)
    records = [(values_of(parameter), record) for _, parameter, record in sparse_parameters(model)]
    keep_whole(records)
    for _, record in records:
        record.left_out = None
    cut_to_one_threshold(records)
    couple_loaded([weight for weight, _ in records], [record for _, record in records])


@torch.no_grad()
def cut_to_one_threshold(records: Sequence[tuple[Tensor, SparseParameter]]) -> None:
    """Where layers that share one threshold hold more weights than it lets participate, choose their masks together."""
    found = [(weight, record) for weight, record in records if isinstance(record.pattern, GlobalUnstructured)]
    if not found or any(weight.is_meta for weight, _ in found):
        return
    shards = [record.shards for _, record in found]
    if any(totals([float(not bool(torch.isfinite(weight).all())) for weight, _ in found], shards)):
        return
    density = found[0][1].density
    sizes = [weight.numel() if record.shards is None else record.shards.numel for weight, record in found]
    if sum(counts_of([record.mask for _, record in found], shards)) <= round(density * sum(sizes)):
        return
    dormant = [record.dormant for _, record in found]
    dense = [
        weight if beside is None else torch.where(record.mask, weight, beside)
        for (weight, record), beside in zip(found, dormant, strict=True)
    ]
    for _, record in found:
        record.remember_mask()
    rewire_masks(dense, [record for _, record in found])
    for (weight, record), values in zip(found, dense, strict=True):
        record.keep(values)
        weight.copy_(values.masked_fill(~record.mask, 0))
