"""Parameters that processes share (torch's DTensor): which part of one this process holds, and sums over all parts.

FSDP2 (``torch.distributed.fsdp.fully_shard``) and tensor parallel both make DTensors of parameters. What sparsefx keeps beside
such a parameter is cut alike, so that everything which looks at one weight or one group of weights stays local.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.errors import StateError


@dataclass(frozen=True, eq=False)
class Shards:
    """How a tensor is cut among processes: along one axis, each process holds the places ``start`` to ``start + length``.

    Attributes:
        shape: of the whole tensor.
        axis: that is cut.
        start: first place of this process.
        length: its number of places; may be 0.
        chunk: the number of places of the first process, from which all borders follow.
        mesh: the DeviceMesh.
        placements: the DTensor's.
        group: the processes that hold the parts, in their order.
    """

    shape: torch.Size
    axis: int
    start: int
    length: int
    chunk: int
    mesh: Any
    placements: tuple[Any, ...]
    group: Any

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return self.shape.numel()

    @property
    def groups(self) -> list[Any]:
        """The processes along each dimension of the mesh: those that share the parameter, and those that repeat its parts."""
        return [self.mesh.get_group(dimension) for dimension in range(self.mesh.ndim)]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The processes, by their global ranks: equal for two shardings over the same processes."""
        return tuple(torch.distributed.get_process_group_ranks(self.group))

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor in the whole shape, as a copy."""
        return whole.narrow(self.axis, self.start, self.length).clone(memory_format=torch.contiguous_format)

    def distributed(self, part: Tensor) -> Tensor:
        """The DTensor whose part on this process is ``part``. Nothing is sent."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        made: Tensor = DTensor.from_local(part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride)
        return made

    def local(self, value: Tensor, name: str) -> Tensor:
        """This process's part of ``value``: a DTensor that is cut alike, or a whole tensor.

        Raises:
            StateError: it is cut in another way, or of another shape.
        """
        if tuple(value.shape) != tuple(self.shape):
            raise StateError(f"{name} has shape {tuple(value.shape)}, expected {tuple(self.shape)}; use the same model")
        if not is_distributed(value):
            return self.part(value)
        if tuple(value.placements) != self.placements or value.device_mesh != self.mesh:  # type: ignore[attr-defined]
            raise StateError(
                f"{name} is placed as {tuple(value.placements)}, expected {self.placements} "  # type: ignore[attr-defined]
                "as its parameter is; torch.distributed.checkpoint.load places values as they are asked for"
            )
        return values_of(value)


def is_distributed(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    # Asking a tensor for what it does not have takes long, and this is asked several times a layer and step.
    return type(tensor) is not Tensor and type(tensor) is not nn.Parameter and hasattr(tensor, "device_mesh")


def values_of(tensor: Tensor) -> Tensor:
    """The values that this process holds of a parameter or a tensor, detached: changing them changes it."""
    if not is_distributed(tensor):
        return tensor.detach()
    with torch.no_grad():
        found: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return found


def shards_of(parameter: Tensor, name: str) -> Shards | None:
    """How a parameter is cut among processes; None for one that every process holds whole.

    Raises:
        StateError: it is cut in a way that is not supported.
    """
    if not is_distributed(parameter):
        return None
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)  # type: ignore[attr-defined]
    cut = [position for position, placement in enumerate(placements) if not placement.is_replicate()]
    if not cut:
        return None
    placement = placements[cut[0]]
    if len(cut) > 1 or type(placement).__name__ != "Shard":
        raise StateError(
            f"{name} is placed as {placements} on a mesh of shape {tuple(mesh.shape)}; expected one Shard at most, and Replicate "
            "beside it. Shard it along one dimension of the mesh (FSDP2, HSDP or tensor parallel alone), or exclude the layer"
        )
    axis, shape, local = placement.dim % parameter.dim(), parameter.shape, values_of(parameter)
    size, rank = mesh.size(cut[0]), mesh.get_local_rank(cut[0])
    chunk = -(-shape[axis] // size)
    start = min(rank * chunk, shape[axis])
    length = min(chunk, shape[axis] - start)
    if tuple(local.shape) != (*shape[:axis], length, *shape[axis + 1 :]):
        raise StateError(
            f"{name} has a part of shape {tuple(local.shape)} of {tuple(shape)} on process {rank} of {size}, expected {length} "
            f"along axis {axis}; shard it evenly"
        )
    return Shards(shape, axis, start, length, chunk, mesh, placements, mesh.get_group(cut[0]))


def totals(counts: Sequence[float], shards: Sequence[Shards | None]) -> list[float]:
    """Each number summed over the processes that share its tensor, in their order, so that all get the same float64."""
    result = list(counts)
    for places in by_group(shards).values():
        first = shards[places[0]]
        assert first is not None
        mine = torch.tensor([counts[place] for place in places], dtype=torch.float64)
        for place, value in zip(places, gather(mine, first), strict=True):
            result[place] = sum(value.tolist())
    return result


def counts_of(chosen: Sequence[Tensor], shards: Sequence[Shards | None]) -> list[int]:
    """How many are True in each tensor, over all processes that share it."""
    # A sum of truth values would make eight bytes of each first.
    return [int(total) for total in totals([float(part.count_nonzero()) for part in chosen], shards)]


def anywhere(flag: bool, shards: Shards | None) -> bool:
    """Whether ``flag`` is True on any process that shares a tensor."""
    return bool(totals([float(flag)], [shards])[0])


def gather(values: Tensor, shards: Shards) -> Tensor:
    """``[..., processes]`` of the ``[...]`` of each process."""
    return gather_among(shards.group, values, shards.mesh.device_type)


def gather_among(group: Any, values: Tensor, device: str) -> Tensor:
    """`gather` among any processes. What lies elsewhere (parameters kept on the CPU) is sent from the mesh's device."""
    sent = values.to(device).contiguous()
    parts = [torch.empty_like(sent) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, sent, group=group)
    return torch.stack(parts, dim=-1).to(values.device)


def add_up(values: Tensor, shards: Shards) -> Tensor:
    """The sum of whole numbers over processes, element by element."""
    sent = values.to(shards.mesh.device_type, copy=True)
    torch.distributed.all_reduce(sent, group=shards.group)
    return sent.to(values.device)


def by_group(shards: Sequence[Shards | None]) -> dict[tuple[int, ...], list[int]]:
    """The positions of those that are shared, by the processes that share them."""
    found: dict[tuple[int, ...], list[int]] = {}
    for position, one in enumerate(shards):
        if one is not None:
            found.setdefault(one.ranks, []).append(position)
    return found
