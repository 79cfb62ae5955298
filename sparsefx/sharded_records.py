"""Masks and dormant values of parameters that processes share: cut as the parameters are, or refused with the reason."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from sparsefx.dormant_values import compact_of
from sparsefx.errors import OptimizerError, StateError
from sparsefx.patterns import Block, Channel, NOfM, Pattern, Transposable
from sparsefx.shards import Shards, gather_among, is_distributed, shards_of
from sparsefx.sparse_parameter import SparseParameter, sparse_parameters

ON_ONE_PROCESS = "do that on one process, with a model that a checkpoint is loaded into before (or without) fully_shard"


def share_out(model: nn.Module) -> None:
    """Cut what stands beside parameters that have become DTensors since `sparsify`. All processes have to call this together.

    Raises:
        OptimizerError: a pattern that cannot be decided within the parts; nothing is changed.
        StateError: processes have chosen different masks, or a DTensor is placed in a way that is not supported.
    """
    reshard(model)
    found: list[tuple[SparseParameter, Shards]] = []
    for name, parameter, record in sparse_parameters(model):
        if record.shards is not None or parameter.shape != record.mask.shape:
            continue  # a shape that does not fit is told by whoever uses it
        shards = shards_of(parameter, name)
        if shards is None:
            continue
        reason = border_refusal(record.pattern, shards, record.reduction_axis)
        if reason is not None:
            raise OptimizerError(f"{name}: {reason}")
        _expect_same_masks(record, shards, name)
        found.append((record, shards))
    for record, shards in found:
        dormant = record.dormant
        record.mask = shards.part(record.mask)
        record.compact = None if dormant is None else compact_of(shards.part(dormant), record.mask)
        record.state = {key: shards.part(value) if value.shape == shards.shape else value for key, value in record.state.items()}
        record.threshold = None
        record.shards = shards


def border_refusal(pattern: Pattern, shards: Shards, reduction_axis: int) -> str | None:
    """Why masks of this pattern cannot be chosen part by part, or None where they can."""
    sides = _group_sides(pattern, reduction_axis)
    if sides is None:
        return f"pattern {pattern.name!r} is not known to work on parameters that are sharded among processes"
    if isinstance(pattern, Channel) and shards.axis != 1 - reduction_axis:
        return (
            f"pattern 'channel' ranks whole filters, but the weight is sharded along axis {shards.axis}, across filters; shard "
            f"it along axis {1 - reduction_axis}, or use pattern 'unstructured'"
        )
    if isinstance(pattern, Block) and shards.axis > 1:
        return f"pattern {pattern.name!r} was given for a weight sharded along axis {shards.axis}; shard it along axis 0"
    side = sides.get(shards.axis, 1)
    if shards.chunk % side and shards.chunk < shards.shape[shards.axis]:
        local = {"NOfM": "'unstructured'", "Transposable": "'2:4'", "Block": "'unstructured'"}[type(pattern).__name__]
        return (
            f"pattern {pattern.name!r} has groups of {side} along axis {shards.axis}, but each process holds {shards.chunk} of "
            f"{shards.shape[shards.axis]} there, so that groups would lie across the borders of shards; shard along another axis "
            f"(shard_placement_fn), over fewer processes, leave the layer out of fully_shard (ignored_params), or pattern {local}"
        )
    return None


def _group_sides(pattern: Pattern, reduction_axis: int) -> dict[int, int] | None:
    """How many neighbours along each axis a mask decides together; None for patterns that are not known."""
    if isinstance(pattern, NOfM):
        return {reduction_axis: pattern.m}
    if isinstance(pattern, Transposable):
        return {0: pattern.m, 1: pattern.m}
    if isinstance(pattern, Block):
        return {1 - reduction_axis: pattern.rows, reduction_axis: pattern.columns}
    known = type(pattern).__name__ in ("Unstructured", "GlobalUnstructured", "Channel")
    return {} if known else None


def reshard(model: nn.Module) -> None:
    """Put FSDP2's sharded parameters in place, where a forward without a backward has left whole ones there."""
    if not any(type(module).__name__.startswith("FSDP") for module in model.modules()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_distributed(model: nn.Module, caller: str, remedy: str = ON_ONE_PROCESS) -> None:
    """Raise StateError where a parameter of the model is shared by processes."""
    for name, parameter in model.named_parameters():
        if is_distributed(parameter):
            raise StateError(f"{caller} was given a model whose {name} is a DTensor, sharded among processes; {remedy}")


def _expect_same_masks(record: SparseParameter, shards: Shards, name: str) -> None:
    if record.mask.is_meta:
        return
    mine = torch.tensor([_checksum(record.mask)])
    # All are asked before any is looked at: no process may wait for one that has raised.
    found = [gather_among(group, mine, shards.mesh.device_type) for group in shards.groups]
    if any(bool((sums != mine).any()) for sums in found):
        raise StateError(
            f"processes have chosen different masks for {name}, so their weights differ; build the model from the same seed (or "
            "load the same weights) on every process before sparsefx.sparsify"
        )


def _checksum(mask: Tensor) -> int:
    return zlib.crc32(mask.contiguous().cpu().view(torch.uint8).numpy().data)
