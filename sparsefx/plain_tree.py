"""Trees of tensors and plain values as JSON beside a table of tensors: nothing in them can run code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsefx.errors import OptionError
from sparsefx.inputs import BlankTensor

_PLAIN = (bool, int, float, str, type(None))
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


def packed(mask: Tensor) -> Tensor:
    """A bool tensor as bits in row-major order: uint8, one dimension, on the CPU."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().contiguous().numpy().reshape(-1)))


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `packed` was given. Raises ValueError where there are too few bits or too many."""
    count = int(np.prod(shape, dtype=np.int64))
    if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.numel() != -(-count // 8):
        raise ValueError(f"{bits.numel()} bytes of bits, expected {-(-count // 8)}")
    values = np.unpackbits(bits.numpy(), count=count).astype(np.bool_)
    return torch.from_numpy(values).reshape(shape)


def plain_tensor(value: Tensor, where: str) -> Tensor:
    """The tensor on the CPU, contiguous and alone in its storage. Raises OptionError for kinds that cannot be written."""
    if type(value) not in _TENSORS or value.layout != torch.strided or value.is_quantized:
        raise OptionError(
            f"{where} is a {type(value).__name__} ({value.layout}), which cannot be written; expected an ordinary dense tensor "
            "(of sharded or quantized ones, save what they were made of)"
        )
    if value.is_meta:
        raise OptionError(f"{where} is on the meta device and has no values; materialise the model before it is saved")
    plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.clone() if plain.untyped_storage().nbytes() != plain.nbytes else plain


def flatten(value: Any, tensors: dict[str, Tensor], prefix: str) -> Any:
    """``value`` as what JSON can hold; its tensors go into ``tensors``, under names that start with ``prefix``.

    Dicts keep their order and their keys (texts and whole numbers), tuples stay tuples, bool tensors are packed.

    Raises:
        OptionError: a value of any other kind, by its place.
    """
    if isinstance(value, Tensor):
        plain = plain_tensor(value, prefix)
        key = f"{prefix}#{len(tensors)}"
        if plain.dtype == torch.bool:
            tensors[key] = packed(plain)
            return {"bits": key, "shape": list(value.shape)}
        tensors[key] = plain
        return {"tensor": key}
    if isinstance(value, BlankTensor):
        return {"blank": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), "device": str(value.device)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {"items": [[key, flatten(item, tensors, f"{prefix}.{key}")] for key, item in value.items()]}
    if type(value) in (list, tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [flatten(item, tensors, f"{prefix}.{position}") for position, item in enumerate(value)]}
    raise OptionError(
        f"{prefix} holds a {type(value).__name__}, which cannot be written; expected tensors, numbers, texts, "
        "and dicts and lists of these"
    )


def unflatten(text: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `flatten` was given. Raises KeyError, TypeError or ValueError for anything it did not make."""
    if type(text) in _PLAIN:
        return text
    if not isinstance(text, dict):
        raise TypeError(f"a {type(text).__name__} where a value was expected")
    if "tensor" in text:
        return tensors[text["tensor"]]
    if "bits" in text:
        return unpacked(tensors[text["bits"]], tuple(int(size) for size in text["shape"]))
    if "blank" in text:
        shape = tuple(int(size) for size in text["blank"])
        return BlankTensor(shape, _dtype(text["dtype"]), torch.device(text["device"]))
    if "dtype" in text:
        return _dtype(text["dtype"])
    if "items" in text:
        return {key: unflatten(item, tensors) for key, item in text["items"]}
    if "tuple" in text:
        return tuple(unflatten(item, tensors) for item in text["tuple"])
    return [unflatten(item, tensors) for item in text["list"]]


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype {name!r}")
    return found
