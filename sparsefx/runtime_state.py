"""Whether a saved runtime state fits a runtime, told before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsefx.errors import StateError
from sparsefx.shards import is_distributed
from sparsefx.sparse_parameter import SparseParameter

STATE_VERSION = 2
_SAVED = {"pattern", "density", "mask", "dormant", "state"}


def check_state(state: dict[str, Any], records: Mapping[str, SparseParameter], algorithm: str, optimizers: int) -> None:
    def refuse(given: object, expected: object, remedy: str) -> StateError:
        return StateError(f"the runtime state cannot be loaded: it has {given}, expected {expected}; {remedy}")

    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        version = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise refuse(f"version {version!r}", STATE_VERSION, "give what MaskRuntime.state_dict() returned")
    if not _is_whole(state):
        raise refuse("missing or damaged entries", "all that MaskRuntime.state_dict() returned", "load an undamaged state")
    if state["algorithm"] != algorithm:
        raise refuse(f"algorithm {state['algorithm']!r}", repr(algorithm), "sparsify with the algorithm it was saved with")
    if len(state["steps"]) != optimizers:
        raise refuse(f"{len(state['steps'])} optimizers", optimizers, "attach with the same optimizers")
    odd = sorted(set(state["parameters"]) ^ set(records))
    if odd:
        raise refuse(
            f"{len(state['parameters'])} masked parameters",
            len(records),
            f"only one side has {', '.join(odd[:3])}; sparsify with the same include and exclude",
        )
    for name, saved in state["parameters"].items():
        record = records[name]
        if saved["pattern"] != record.pattern.name:
            raise refuse(f"pattern {saved['pattern']!r} for {name}", repr(record.pattern.name), "sparsify with that pattern")
        shape, mask, dormant = tuple(record.mask.shape), saved["mask"], saved["dormant"]
        if not _is_plain(mask) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise refuse(f"another mask for {name}", f"bool {shape}", "use the same model")
        if (dormant is None) != (record.compact is None):
            raise refuse(f"other dormant values for {name}", "those of this algorithm", "sparsify with the same algorithm")
        if dormant is not None and not (_is_plain(dormant) and dormant.is_floating_point() and tuple(dormant.shape) == shape):
            raise refuse(f"other dormant values for {name}", f"{shape}", "use the same model")
        if dormant is not None and not bool(torch.isfinite(dormant).all()):
            raise refuse(f"NaN or infinity in {name}", "finite values", "load an earlier checkpoint")
        kept = {key: (value.shape, value.dtype) for key, value in record.state.items()}
        given = {key: (value.shape, value.dtype) for key, value in saved["state"].items() if isinstance(value, Tensor)}
        if given != kept or len(given) != len(saved["state"]):
            raise refuse(f"other values of the algorithm for {name}", "its own", "sparsify with the same algorithm and options")
        if not isinstance(saved["density"], (int, float)) or not 0 < saved["density"] <= 1:
            raise refuse(f"density {saved['density']!r} for {name}", "a number in (0, 1]", "load an undamaged state")
        target = saved.get("target")
        if target is not None and (not isinstance(target, (int, float)) or not 0 < target <= 1):
            raise refuse(f"target {target!r} for {name}", "a number in (0, 1]", "load an undamaged state")
        if not _fits(mask, record, saved["density"]):
            raise refuse(f"a mask for {name} that is not {record.pattern.name}", "one that is", "load an undamaged state")
    if not _is_random_state(state["generator"]):
        raise refuse("a generator's state that torch does not take", "one of a CPU generator", "load an undamaged state")


def _is_plain(value: object) -> bool:
    """Whether it is a dense tensor with values."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def _is_random_state(state: Tensor) -> bool:
    try:
        torch.Generator().set_state(state)
    except RuntimeError:
        return False
    return True


def of_this_process(state: Any, records: Mapping[str, SparseParameter]) -> Any:
    """The state with this process's part of all that stands beside sharded parameters.

    Raises:
        StateError: a DTensor is placed in another way than its parameter, or has another shape.
    """
    if not isinstance(state, dict) or not _is_whole(state):
        return state  # told by `check_state`

    def part(value: Any, record: SparseParameter, name: str) -> Any:
        shards = record.shards
        if not isinstance(value, Tensor):
            return value
        if shards is None:
            return value.full_tensor() if is_distributed(value) else value  # type: ignore[attr-defined]
        return value if value.shape == record.mask.shape and not is_distributed(value) else shards.local(value, name)

    parameters: dict[str, Any] = {}
    for name, saved in state["parameters"].items():
        record = records.get(name)
        if record is None:
            parameters[name] = saved
            continue
        beside = {
            key: part(value, record, f"{key} of {name}") if _is_beside(value, record) else value
            for key, value in saved["state"].items()
        }
        own = {key: part(saved[key], record, f"the {key} of {name}") for key in ("mask", "dormant")}
        parameters[name] = {**saved, **own, "state": beside}
    return {**state, "parameters": parameters}


def _is_beside(value: Any, record: SparseParameter) -> bool:
    return isinstance(value, Tensor) and (
        is_distributed(value) or (record.shards is not None and value.shape == record.shards.shape)
    )


def _is_whole(state: dict[str, Any]) -> bool:
    parameters, steps, values, generator = (state.get(key) for key in ("parameters", "steps", "values", "generator"))
    if not isinstance(parameters, dict) or not isinstance(steps, list) or "algorithm" not in state:
        return False
    if not isinstance(values, list) or len(values) != len(steps) or not all(isinstance(value, dict) for value in values):
        return False
    if (
        not isinstance(generator, Tensor)
        or generator.dtype != torch.uint8
        or generator.shape != torch.Generator().get_state().shape
    ):
        return False
    whole = all(isinstance(saved, dict) and saved.keys() >= _SAVED for saved in parameters.values())
    if not whole or not all(isinstance(saved["state"], dict) for saved in parameters.values()):
        return False
    if not all(isinstance(number, (int, float)) for value in values for number in value.values()):
        return False
    return all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in steps)


def _fits(mask: Tensor, record: SparseParameter, density: object) -> bool:
    """Whether the pattern allows the mask: among masks of a fixed density, it is then its own best mask."""
    if record.pattern.fixed_density is None:
        return True
    if density != record.pattern.fixed_density:
        return False
    best = record.pattern.mask(mask.to(torch.float32), reduction_axis=record.reduction_axis)
    return bool(torch.equal(best, mask))
