"""What stands in a sparse file: tensors by name, and a description of them in JSON."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx import patterns
from sparsefx.algorithms import ALGORITHMS, Algorithm
from sparsefx.errors import OptionError, SparsefxError, StateError
from sparsefx.model_record import ModelRecord, model_records
from sparsefx.patterns import Pattern
from sparsefx.plain_tree import flatten, packed, plain_tensor, unflatten
from sparsefx.report import LayerReport
from sparsefx.sparse_parameter import sparse_parameters

VERSION = 1
OWN = "sparsefx/"


def content_of(
    model: nn.Module, runtime: dict[str, Any] | None, extra: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file for ``model``.

    Raises:
        OptionError: a value that cannot be written, by its name.
    """
    tensors, aliases, other = _weights(model)
    parameters: dict[str, Any] = {}
    for name, parameter, record in sparse_parameters(model):
        mask = record.mask
        dormant = parameter.detach() if record.merged and record.compact is not None else record.dormant
        if record.merged:  # after a step that raised: the weight holds the dormant values
            tensors[name] = plain_tensor(parameter.detach().masked_fill(~mask, 0), name)
        tensors[f"{OWN}mask/{name}"] = packed(plain_tensor(mask, f"the mask of {name}"))
        if dormant is not None:
            tensors[f"{OWN}dormant/{name}"] = plain_tensor(dormant[~mask], f"the dormant values of {name}")
        parameters[name] = {
            "pattern": record.pattern.name,
            "density": record.density,
            "target": record.target,
            "reduction_axis": record.reduction_axis,
            "algorithm": _algorithm_text(record.algorithm),
            "dormant": dormant is not None,
        }
    description = {
        "version": VERSION,
        "aliases": aliases,
        "other": flatten(other, tensors, f"{OWN}other"),
        "parameters": parameters,
        "models": _models(model, tensors),
        "runtime": None if runtime is None else flatten(_without_masks(runtime, model), tensors, f"{OWN}runtime"),
        "extra": flatten(dict(extra), tensors, f"{OWN}extra"),
        "sums": {},
    }
    description["sums"] = {name: checksum(value) for name, value in tensors.items()}
    text = json.dumps(description, ensure_ascii=False)
    return tensors, {"format": "pt", "sparsefx": text, "sparsefx_sum": str(zlib.crc32(text.encode()))}


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a contiguous tensor on the CPU."""
    return zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0


def _weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """The state_dict's tensors, names that stand for the tensor of another name, and values that are no tensors."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    other: dict[str, Any] = {}
    first: dict[Any, str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        if name.startswith(OWN):
            raise OptionError(f"the model has a value named {name!r}, a name that sparsefx files keep for themselves; rename it")
        if not isinstance(value, Tensor):
            other[name] = value
            continue
        plain = plain_tensor(value, name)
        place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and first.setdefault(place, name) != name:
            aliases[name] = first[place]
            continue
        storage = plain.untyped_storage().data_ptr()
        tensors[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return tensors, aliases, other


def _models(model: nn.Module, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    names = {module: name for name, module in model.named_modules()}
    return [
        {
            "module": names[module],
            "pattern": record.pattern,
            "density": record.density,
            "algorithm": record.algorithm,
            "layers": [{**asdict(layer), "backend": ""} for layer in record.layers],
            "unseen": list(record.unseen),
            "inputs": flatten(record.inputs, tensors, f"{OWN}inputs"),
        }
        for module, record in model_records(model)
    ]


def _without_masks(runtime: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The runtime's state without the masks and dormant values that stand in the file anyway."""
    records = {name: record for name, _, record in sparse_parameters(model) if not record.merged}
    kept: dict[str, Any] = {}
    for name, saved in runtime["parameters"].items():
        record = records.get(name)
        same = record is not None and record.mask.equal(saved["mask"]) and _same(record.dormant, saved["dormant"])
        kept[name] = {key: value for key, value in saved.items() if not same or key not in ("mask", "dormant")}
    return {**runtime, "parameters": kept}


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else one.equal(other)


def with_masks(runtime: dict[str, Any], masks: Mapping[str, tuple[Tensor, Tensor | None]]) -> dict[str, Any]:
    """Undo `_without_masks`."""
    for name, saved in runtime["parameters"].items():
        if "mask" not in saved:
            saved["mask"], saved["dormant"] = masks[name]
    return runtime


def _algorithm_text(algorithm: Algorithm | None) -> dict[str, Any] | None:
    """The name and those options that are not the named algorithm's own; ``options`` None where a file cannot tell them."""
    if algorithm is None:
        return None
    named = _named(algorithm.name)
    if type(named) is not type(algorithm):
        return {"name": algorithm.name, "options": None}
    changed = {
        f.name: getattr(algorithm, f.name) for f in fields(algorithm) if getattr(algorithm, f.name) != getattr(named, f.name)
    }
    plain = all(value is None or type(value) in (bool, int, float, str) for value in changed.values())
    return {"name": algorithm.name, "options": changed if plain else None}


def _named(name: str) -> Algorithm | None:
    return next((algorithm for algorithm in ALGORITHMS if algorithm.name == name), None)


def algorithm_of(text: dict[str, Any] | None) -> Algorithm | None:
    """The algorithm that a description names. Raises StateError where it is one of the user's own."""
    if text is None:
        return None
    named = _named(text["name"])
    if named is None or text["options"] is None:
        raise StateError(
            f"the file was saved with an algorithm of your own, {text['name']!r}, which a file cannot hold; "
            "sparsify the model with it first, then load"
        )
    return replace(named, **text["options"])


def pattern_of(name: str) -> Pattern:
    """The pattern of this name. Raises StateError where it is one of the user's own."""
    try:
        return patterns.parse(name)
    except SparsefxError:
        raise StateError(
            f"the file was saved with a pattern of your own, {name!r}, which a file cannot hold; "
            "sparsify the model with it first, then load"
        ) from None


def model_record_of(text: dict[str, Any], tensors: Mapping[str, Tensor]) -> ModelRecord:
    """A ModelRecord from its description."""
    layers = [{**row, "shape": tuple(row["shape"]), "call_sites": tuple(row["call_sites"])} for row in text["layers"]]
    return ModelRecord(
        pattern=text["pattern"],
        density=text["density"],
        algorithm=text["algorithm"],
        layers=tuple(LayerReport(**row) for row in layers),
        unseen=tuple(text["unseen"]),
        inputs=unflatten(text["inputs"], tensors),
    )
