"""Which optimizer updates which masked parameter, and which cannot be followed."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsefx.algorithms.base import Algorithm
from sparsefx.coupled_records import PATTERN, by_coupling
from sparsefx.errors import OptimizerError, StateError
from sparsefx.patterns import GlobalUnstructured
from sparsefx.shards import is_distributed, values_of
from sparsefx.sparse_parameter import SparseParameter, expect_masked, records_of, sparse_parameters


class Detachable(Protocol):
    """What following needs to know of another MaskRuntime."""

    def detach(self) -> None: ...


@dataclass(eq=False)
class Followed:
    """One masked parameter that an optimizer updates; the Parameter is looked up anew at every step."""

    name: str
    module: nn.Module
    local_name: str
    record: SparseParameter

    def alive(self) -> bool:
        """Whether the record still stands beside the parameter."""
        return records_of(self.module).get(self.local_name) is self.record

    def parameter(self) -> nn.Parameter:
        if not self.alive():
            raise StateError(
                f"{self.name}: the model was finalized or sparsified again while a MaskRuntime is attached; "
                "call runtime.detach() before that, and attach again afterwards"
            )
        parameter = self.module._parameters.get(self.local_name)
        if parameter is None:
            raise StateError(f"{self.name}: a parametrization took the parameter's place; remove it, or call runtime.detach()")
        expect_masked(self.name, parameter, self.record)
        return parameter

    def weight(self) -> Tensor:
        """The parameter's values, of a sharded one those of this process; detached, so that changing them changes it."""
        return values_of(self.parameter())


def owners_of(model: nn.Module) -> dict[str, Followed]:
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[str, Followed] = {}
    seen: dict[int, str] = {}
    for full_name, parameter, record in sparse_parameters(model):
        module_name, _, local_name = full_name.rpartition(".")
        name = _plain(full_name)
        if seen.setdefault(id(parameter), name) != name:
            raise StateError(
                f"{seen[id(parameter)]} and {name} are one parameter with two masks, since parts of the model were sparsified "
                "apart; finalize both parts, and sparsify the whole model"
            )
        owners[name] = Followed(name, modules[module_name], local_name, record)
    if not owners:
        raise StateError("attach was given a model without masked parameters; call sparsefx.sparsify(model) first")
    return owners


def _plain(name: str) -> str:
    """The parameter's name without what torch.compile and data parallel wrappers put into it."""
    return ".".join(part for part in name.removeprefix("module.").split(".") if part != "_orig_mod").removeprefix("module.")


def plan_of(optimizers: Sequence[Optimizer], owners: dict[str, Followed], required: bool = True) -> list[list[str]]:
    """For each optimizer, the names of the masked parameters that it updates, in the model's order."""
    order = {name: number for number, name in enumerate(owners)}
    by_identity: dict[int, str] = {}
    for name, entry in owners.items():
        parameter = entry.parameter()
        by_identity[id(parameter)] = name
        if getattr(parameter, "_in_backward_optimizers", None):
            raise OptimizerError(
                f"{name} is updated by an optimizer fused into backward, whose steps cannot be followed; "
                "use an ordinary optimizer and call optimizer.step() after backward"
            )
        if type(parameter) is not nn.Parameter and not is_distributed(parameter):
            raise OptimizerError(
                f"{name} has become a {type(parameter).__name__}, which a mask runtime cannot follow; train it as a plain "
                "Parameter, or finalize the model first"
            )
    plan: list[list[str]] = []
    taken: dict[str, int] = {}
    for position, optimizer in enumerate(optimizers):
        _expect_hookable(optimizer)
        names = [by_identity[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in by_identity]
        names.sort(key=order.__getitem__)
        for name in names:
            if taken.setdefault(name, position) != position:
                raise OptimizerError(
                    f"{name} is held by two of the optimizers given; one parameter has one optimizer: leave one of them out"
                )
        plan.append(names)
        if required and not names:
            raise OptimizerError(
                f"{type(optimizer).__name__} holds none of the model's {len(owners)} masked parameters; create the optimizer "
                "from model.parameters() of the very model that was sparsified, after any move that replaces parameters"
            )
    return plan


def _expect_hookable(optimizer: object) -> None:
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise OptimizerError(
            f"the {type(optimizer).__name__} makes its steps inside backward (overlap_with_ddp=True), where they cannot be "
            "followed; create it without overlap_with_ddp"
        )
    hookable = not isinstance(optimizer, type) and all(
        hasattr(optimizer, name)
        for name in ("param_groups", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "register_step_pre_hook")
    )
    if not hookable or not getattr(type(optimizer).step, "hooked", False):  # type: ignore[attr-defined]
        given = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else f"a {type(optimizer).__name__}"
        raise OptimizerError(
            f"attach was given {given} as an optimizer, but its steps cannot be hooked; expected a torch.optim.Optimizer "
            "(of a wrapper around one, give the optimizer inside)"
        )


def refuse_shards(algorithm: Algorithm, owners: dict[str, Followed]) -> None:
    """Raise OptimizerError where parameters are shared by processes, and the masks of this algorithm cannot be."""
    shared = [name for name, entry in owners.items() if entry.record.shards is not None]
    reason = algorithm.shards_refusal()
    if shared and reason is not None:
        raise OptimizerError(
            f"{shared[0]} is sharded among processes, where algorithm {algorithm.name!r} cannot move masks: {reason}. Use "
            "DistributedDataParallel, or another algorithm such as 'magnitude' or 'rigl'"
        )


def refuse_split_threshold(owners: dict[str, Followed], plan: Sequence[Sequence[str]]) -> None:
    together = {name for name, entry in owners.items() if isinstance(entry.record.pattern, GlobalUnstructured)}
    places = {name: None if shards is None else shards.ranks for name in together for shards in (owners[name].record.shards,)}
    if len(set(places.values())) > 1:
        raise OptimizerError(
            "layers that share one threshold (pattern 'unstructured:global') are sharded over different processes, or some are "
            "not sharded; shard them alike, or use pattern 'unstructured'"
        )
    for names in plan:
        missing = sorted(together - set(names))
        if missing and together & set(names):
            raise OptimizerError(
                f"{missing[0]} shares one threshold (pattern 'unstructured:global') with layers of an optimizer that does not "
                "hold it; give one optimizer all of them, or use pattern 'unstructured'"
            )


def refuse_split_channels(algorithm: Algorithm, owners: dict[str, Followed], plan: Sequence[Sequence[str]]) -> None:
    """Raise where the filters of pattern ``channel:coupled`` could not be chosen together."""
    mine = {name: entry.record for name, entry in owners.items() if entry.record.pattern == PATTERN}
    lost = [name for name, record in mine.items() if record.coupled is None]
    if lost and algorithm.moves:
        raise StateError(
            f"{lost[0]} has pattern 'channel:coupled', but not with what: its channels were cut, or its mask comes from a file. "
            "Call sparsify with example_inputs before loading; or to empty more of it, sparsefx.finalize and then sparsify"
        )
    records = list(mine.values())
    for positions in by_coupling(records):
        names = {name for number, name in enumerate(mine) if number in positions}
        for held in plan:
            missing = sorted(names - set(held))
            if missing and names & set(held) and algorithm.moves:
                raise OptimizerError(
                    f"{missing[0]} is coupled (pattern 'channel:coupled') with layers of an optimizer that does not hold it; "
                    "give one optimizer all of them, or use pattern 'channel'"
                )


def broadcast_generator(owners: dict[str, Followed], generator: torch.Generator) -> None:
    """Processes that share parameters draw the same numbers: those of the first of them."""
    seen: set[tuple[int, ...]] = set()
    for entry in owners.values():
        shards = entry.record.shards
        if shards is not None and shards.ranks not in seen:
            seen.add(shards.ranks)
            state = generator.get_state().to(shards.mesh.device_type)
            # Along one dimension of the mesh after the other, from its first place: all end with those of the first process.
            for group in reversed(shards.groups):
                source = torch.distributed.get_process_group_ranks(group)[0]
                torch.distributed.broadcast(state, source, group=group)
            generator.set_state(state.cpu())


def broadcast_masks(model: nn.Module, generator: torch.Generator) -> None:
    """Replicas start from the masks, densities and random numbers of rank 0, as DistributedDataParallel starts them from its
    parameters."""
    for wrapper in model.modules():
        if not isinstance(wrapper, nn.parallel.DistributedDataParallel):
            continue
        group = wrapper.process_group
        source = torch.distributed.get_global_rank(group, 0)
        device = next(wrapper.parameters()).device
        state = generator.get_state().to(device)
        torch.distributed.broadcast(state, source, group=group)
        generator.set_state(state.cpu())
        for _, parameter, record in sparse_parameters(wrapper):
            # Both may come from weights, which differed.
            densities = torch.tensor([record.density, record.target or 0.0], dtype=torch.float64, device=device)
            torch.distributed.broadcast(densities, source, group=group)
            record.density = float(densities[0])
            record.target = None if record.target is None else float(densities[1])
            weight = parameter.detach()
            record.follow(weight)
            dormant = record.dormant
            bits = record.mask.to(torch.uint8).contiguous()
            torch.distributed.broadcast(bits, source, group=group)
            record.mask.copy_(bits)
            if dormant is not None:
                values = dormant.contiguous()
                torch.distributed.broadcast(values, source, group=group)
                record.keep(values)
            weight.masked_fill_(~record.mask, 0)


def refuse_double_following(owners: dict[str, Followed], plan: Iterable[Iterable[str]], replace: bool) -> None:
    followed = [owners[name] for names in plan for name in names]
    if any(runtime_of(entry) is not None for entry in followed):
        gc.collect()  # a forgotten optimizer and its hooks are a reference cycle
    for entry in followed:
        runtime = runtime_of(entry)
        if runtime is None:
            continue
        if not replace:
            raise StateError(
                f"{entry.name} is already followed by another MaskRuntime; call its detach(), or attach(..., replace=True)"
            )
        runtime.detach()


def runtime_of(entry: Followed) -> Detachable | None:
    return None if entry.record.runtime is None else entry.record.runtime()
