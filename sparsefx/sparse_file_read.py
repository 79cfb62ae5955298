"""Read a sparse file, and hold it to its checksums, before anything else is done with it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsefx.errors import OptionError, SparsefxError
from sparsefx.plain_tree import unflatten, unpacked
from sparsefx.sparse_file_content import OWN, VERSION, checksum, with_masks
from sparsefx.weights_file import read_weights


@dataclass(eq=False)
class SavedParameter:
    """What a file tells of one sparse parameter. ``dormant`` has the parameter's shape, zero where the mask is True."""

    pattern: str
    density: float
    target: float | None
    reduction_axis: int
    algorithm: dict[str, Any] | None
    mask: Tensor
    dormant: Tensor | None


@dataclass(eq=False)
class Content:
    """A file as read: the state_dict, and what stands beside it (nothing, in a file that sparsefx did not write)."""

    state: dict[str, Any]
    parameters: dict[str, SavedParameter] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    runtime: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def read(name: str) -> Content:
    """Read any file of weights. Only tensors and plain values are read: no code of the file runs.

    Raises:
        OptionError: there is no such file, it is damaged, or it holds no weights.
    """
    with _told_as_damage(name):
        try:
            with safe_open(name, framework="pt") as file:
                metadata = file.metadata() or {}
                if "sparsefx" not in metadata:
                    return Content(read_weights(name))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        except SafetensorError:
            if name.endswith(".safetensors"):
                raise
            return Content(read_weights(name))
        text = metadata["sparsefx"]
        if str(zlib.crc32(text.encode())) != metadata.get("sparsefx_sum"):
            raise ValueError("its description does not fit its checksum")
        description = json.loads(text)
        if description.get("version") != VERSION:
            raise OptionError(
                f"{name} is a sparsefx file of version {description.get('version')!r}, expected {VERSION}; "
                "load it with the sparsefx that wrote it"
            )
        sums = description["sums"]
        if sums.keys() != tensors.keys():
            raise ValueError("tensors are missing")
        for key, value in tensors.items():
            if checksum(value) != sums[key]:
                raise ValueError(f"the values of {key} do not fit their checksum")
        return _content(description, tensors)


def _content(description: dict[str, Any], tensors: dict[str, Tensor]) -> Content:
    state: dict[str, Any] = {key: value for key, value in tensors.items() if not key.startswith(OWN)}
    state |= {alias: state[origin] for alias, origin in description["aliases"].items()}
    # What is handed out must not lie in the memory of the file.
    own = {key: value.clone() for key, value in tensors.items() if key.startswith(OWN)}
    state |= unflatten(description["other"], own)
    parameters: dict[str, SavedParameter] = {}
    for name, saved in description["parameters"].items():
        shape = tuple(state[name].shape)
        mask = unpacked(own[f"{OWN}mask/{name}"], shape)
        dormant = None
        if saved["dormant"]:
            values = own[f"{OWN}dormant/{name}"]
            dormant = torch.zeros(shape, dtype=values.dtype)
            dormant[~mask] = values
        parameters[name] = SavedParameter(**{**saved, "mask": mask, "dormant": dormant})
    runtime = description["runtime"]
    if runtime is not None:
        masks = {name: (saved.mask, saved.dormant) for name, saved in parameters.items()}
        runtime = with_masks(unflatten(runtime, own), masks)
    return Content(state, parameters, description["models"], runtime, unflatten(description["extra"], own), own)


@contextmanager
def _told_as_damage(name: str) -> Iterator[None]:
    try:
        yield
    except SparsefxError:
        raise
    except FileNotFoundError:
        raise OptionError(f"there is no file {name}; expected one that sparsefx.save wrote, or a state_dict") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise OptionError(f"{name} is damaged or no file of weights: {error}; load another checkpoint") from error
