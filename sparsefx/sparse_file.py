"""Save a sparse model as one safetensors file, and load it again: whole or not at all, without running code of the file.

The file holds the weights under their state_dict names, zeros included, so that any reader of safetensors finds the sparse
model in it. Beside them stand, under names that begin with ``sparsefx/``, the masks as bits and the dormant values of the
weights that do not participate; what describes them is JSON in the file's metadata.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsefx.atomic_file import replace_file
from sparsefx.errors import OptionError, StateError
from sparsefx.runtime import MaskRuntime
from sparsefx.sharded_records import refuse_distributed
from sparsefx.sparse_file_content import content_of
from sparsefx.sparse_file_place import Plan, place
from sparsefx.sparse_file_read import Content, read
from sparsefx.sparse_parameter import SparseParameter, sparse_parameters


@dataclass(frozen=True)
class Loaded:
    """What `load` found in a file besides weights and masks.

    Attributes:
        runtime: the state of the MaskRuntime, for ``runtime.load_state_dict``; None where none was saved.
        extra: what ``save(..., extra=)`` was given.
        masked: names of the parameters whose masks came from the file.
        missing: names that the model has and the file has not (with ``strict=False``).
        unexpected: names that the file has and the model has not (with ``strict=False``).
    """

    runtime: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    masked: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    runtime: MaskRuntime | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write weights and masks of ``model`` to one file, which appears whole or not at all, even if the process is killed.

    Args:
        model: sparsified, finalized or dense; wrappers (DDP, a compiled module) are looked through. It is not changed.
        path: where to write; a file already there is replaced in one step.
        runtime: what `sparsefx.attach` returned, to go on training from the file bit for bit.
        extra: whatever else belongs to the checkpoint, in a dict: ``{"optimizer": optimizer.state_dict(), "epoch": 3}``. Tensors,
            numbers, texts, and dicts, lists and tuples of these.

    Raises:
        OptionError: the file cannot be written, or something in the model or in ``extra`` is neither tensor nor plain value.
    """
    _expect(model, runtime, "save")
    refuse_distributed(
        model,
        "save",
        'save with torch.distributed.checkpoint: {"model": model.state_dict(), "sparsity": runtime.state_dict(), ...}',
    )
    if extra is not None and not (isinstance(extra, Mapping) and all(isinstance(key, str) for key in extra)):
        raise OptionError(f"save was given extra={type(extra).__name__}; expected a dict with texts as keys")
    try:
        tensors, metadata = content_of(_inner(model), None if runtime is None else runtime.state_dict(), extra or {})
    except RecursionError as error:
        raise OptionError(
            "save was given extra that contains itself; expected a finite tree of dicts, lists and tuples"
        ) from error
    replace_file(path, lambda made: save_file(tensors, made, metadata))


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    runtime: MaskRuntime | None = None,
    masks: bool = True,
    strict: bool = True,
) -> Loaded:
    """Load a file into ``model``, in place, all or nothing. Nothing in the file is run as code.

    What becomes of the model depends on both:

    - A file of a sparse model makes a dense model sparse as the saved one was: same masks, patterns and algorithm. (For the
      sparse weights in a dense model, give ``masks=False``.)
    - It gives a sparsified model of the same patterns its weights and masks. The model keeps its own algorithm.
    - A file without masks (a finalized or dense model, any ``.safetensors`` or ``torch.save`` of a state_dict) is loaded as
      ``load_state_dict`` does: into a dense model as it is, into a sparsified model with masks chosen for its values.

    Args:
        model: of the class that was saved, wrapped or not. Its dtypes and devices stay.
        path: what `save` wrote, or a file with a state_dict.
        runtime: restore the state of the runtime too; it must be attached to ``model``.
        masks: False takes the weights alone, under the masks that the model has (or chooses for them).
        strict: False loads what model and file have in common. Values of another shape are refused all the same.

    Raises:
        OptionError: the file is missing, damaged, foreign, or does not fit the model.
        StateError: the model is sparse with other patterns or in other layers than the file, or the runtime does not fit.
    """
    _expect(model, runtime, "load")
    refuse_distributed(
        model, "load", "load before fully_shard, attach after it, and give runtime.load_state_dict what load returned as .runtime"
    )
    inner = _inner(model)
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else repr(path)
    content = read(name)
    plan = _plan(inner, content, name, masks=masks, strict=strict)
    if runtime is not None:
        if content.runtime is None:
            raise StateError(
                f"{name} holds no state of a runtime; save it with save(model, path, runtime=runtime), or leave runtime out"
            )
        if not masks:
            raise OptionError("load was given runtime= and masks=False, but the runtime's state has masks; leave one of them out")
        runtime.check_state_dict(content.runtime)
    place(inner, plan, None if runtime is None else (runtime, content.runtime or {}))
    return Loaded(content.runtime, content.extra, tuple(plan.parameters), plan.missing, plan.unexpected)


def _plan(model: nn.Module, content: Content, name: str, *, masks: bool, strict: bool) -> Plan:
    """What is to be loaded where. Raises where it does not fit; nothing is changed here."""
    expected = model.state_dict()
    missing = tuple(key for key in expected if key not in content.state)
    unexpected = tuple(key for key in content.state if key not in expected)
    common = [key for key in expected if key in content.state]
    misfits = [key for key in common if _shape(expected[key]) != _shape(content.state[key])]
    if misfits or (strict and (missing or unexpected)) or not common:
        raise OptionError(
            f"{name} does not fit the model: "
            + "; ".join(
                f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for names, what in ((missing, "missing"), (unexpected, "unexpected"), (misfits, "of another shape"))
                if names
            )
            + ("; load it into the model that it was saved from" if misfits or not common else "; strict=False loads what fits")
        )
    meta = [key for key in common if isinstance(expected[key], Tensor) and expected[key].is_meta]
    if meta:
        raise StateError(f"{meta[0]} is on the meta device; give the model memory first: model.to_empty(device='cpu')")
    state = {key: content.state[key] for key in common}
    _expect_ties(model, content, name)
    own = {key: record for key, _, record in sparse_parameters(model)}
    saved = {key: value for key, value in content.parameters.items() if key in state} if masks else {}
    if saved and own:
        _expect_same_patterns(own, {key: value.pattern for key, value in saved.items()}, name, strict)
        saved = {key: value for key, value in saved.items() if key in own}
    models = content.models if saved and not own else []
    return Plan.of(model, state, saved, models, content.tensors, missing, unexpected)


def _expect_ties(model: nn.Module, content: Content, name: str) -> None:
    """Names that are one tensor in the model need one value and one mask in the file."""
    first: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or key not in content.state:
            continue
        other = first.setdefault(id(tensor), key)
        if other == key:
            continue
        one, two = content.parameters.get(other), content.parameters.get(key)
        masks = [saved.mask for saved in (one, two) if saved is not None]
        same = torch.equal(content.state[other], content.state[key]) and (len(masks) < 2 or torch.equal(*masks))
        if not same:
            raise OptionError(
                f"{other} and {key} are one tensor in the model, but {name} has different values for them; load it into a model "
                "in which they are not tied, as it was saved from"
            )


def _expect_same_patterns(own: dict[str, SparseParameter], saved: dict[str, str], name: str, strict: bool) -> None:
    remedy = (
        "call sparsefx.finalize(model) first to make it sparse as the file is, "
        "or load(..., masks=False) to keep the model's own patterns"
    )
    for key in own:
        if key in saved and own[key].pattern.name != saved[key]:
            raise StateError(
                f"{name} has pattern {saved[key]!r} for {key}, but the model has {own[key].pattern.name!r}; {remedy}"
            )
    odd = sorted(own.keys() ^ saved.keys())
    if odd and strict:
        side = "the file" if odd[0] in saved else "the model"
        raise StateError(f"only in {side} is {odd[0]} sparse ({len(odd)} such parameters); {remedy}")


def _expect(model: object, runtime: object, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"{caller} was given a {type(model).__name__}; expected a torch.nn.Module")
    if runtime is not None and not isinstance(runtime, MaskRuntime):
        raise OptionError(f"{caller} was given runtime={type(runtime).__name__}; expected what sparsefx.attach returned")
    if isinstance(runtime, MaskRuntime) and not runtime.follows(model):
        raise StateError(f"{caller} was given a runtime that follows another model; give the one that is attached to this model")


def _inner(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else None
