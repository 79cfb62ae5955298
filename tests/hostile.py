"""What tests of hostile input share: a net, a picture of everything that must not change, and what a clear error is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsefx.errors import SparsefxError
from sparsefx.sparse_parameter import records_of

# What there was to expect, or what to do about it.
_REMEDY = re.compile(
    r"expected|give |pass |call |use |load |leave |choose|untie|exclude|widen|sparsify|create|put |convert|attach|remove|save "
    r"|name |export it|did you mean"
)


def net(seed: int = 0) -> nn.Sequential:
    """Two Linear layers that can be sparse."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


def sgd(model: nn.Module) -> torch.optim.SGD:
    """An optimizer with momentum."""
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def picture(*things: Any, folder: Path | None = None) -> Any:
    """Models (values, records, hooks), optimizers (state, hooks, groups), random state, and the files of a folder."""
    seen: list[Any] = [torch.get_rng_state()]
    for thing in things:
        if isinstance(thing, nn.Module):
            seen.append({name: value.clone() for name, value in thing.state_dict().items() if not value.is_meta})
            for name, module in thing.named_modules():
                own = {
                    key: (one.mask.clone(), one.density, copy.deepcopy(one.dormant)) for key, one in records_of(module).items()
                }
                kept = {key: len(value) for key, value in module.__dict__.items() if key.endswith("hooks")}
                seen.append((name, own, kept, sorted(module.__dict__), [id(p) for p in module.parameters(recurse=False)]))
        else:
            hooks = len(thing._optimizer_step_pre_hooks), len(thing._optimizer_step_post_hooks)
            seen.append((copy.deepcopy(thing.state_dict()), hooks))
    if folder is not None:
        seen.append({str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()})
    return seen


def same(one: Any, other: Any) -> bool:
    """Whether two pictures are equal, NaN and NaN too."""
    if isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or one.dtype != other.dtype or one.shape != other.shape:
            return False
        if one.layout is not torch.strided:
            return bool(torch.equal(one.to_dense(), other.to_dense()))
        if one.is_floating_point() and one.dtype.itemsize == 1:
            return bool(torch.equal(one.view(torch.uint8), other.view(torch.uint8)))
        return bool(torch.equal(one.nan_to_num(), other.nan_to_num())) if one.is_floating_point() else torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def refused(action: Callable[[], object], told: str, *things: Any, folder: Path | None = None) -> None:
    """``action`` raises a SparsefxError that tells ``told`` and a remedy, and leaves everything as it was."""
    before = picture(*things, folder=folder)
    with pytest.raises(SparsefxError, match=told) as caught:
        action()
    message = str(caught.value)
    assert _REMEDY.search(message), f"no remedy in: {message}"
    assert same(before, picture(*things, folder=folder)), "something was changed"
