"""Modules hold the sizes of the parts that they take of a tensor: these are cut along with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from tests.channel_pruning import empty, filled, pruned

ROWS = (3, 16)


class Gated(nn.Module):
    """Parts by a list of sizes, or by one size, under any name."""

    def __init__(self, sizes: Any) -> None:
        super().__init__()
        self.pieces = sizes
        self.into, self.out = nn.Linear(16, 24), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, value, more = torch.split(self.into(x), self.pieces, dim=-1)
        made: Tensor = x + self.out(torch.relu(gate) * value + more)
        return made


class Halved(nn.Module):
    """Half of a number, as code that was written for a width computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 24
        self.into, self.left, self.right = nn.Linear(16, 24), nn.Linear(12, 16), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.into(x).split(self.width // 2, dim=-1)
        made: Tensor = x + self.left(one).relu() * self.right(other)
        return made


class Uneven(nn.Module):
    """Parts of different sizes, which lose differently many channels."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.into = nn.Linear(16, 24)
        self.each = nn.ModuleList(nn.Linear(size, 16) for size in self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        parts: Sequence[Tensor] = self.into(x).split(self.sizes, -1)
        return x + sum(layer(part) for layer, part in zip(self.each, parts, strict=True))


class Counted(nn.Module):
    """A number that equals the size of a part and is something else as well."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 12
        self.into, self.left, self.right = nn.Linear(16, 24), nn.Linear(12, 16), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.into(x).split(self.number, dim=-1)
        made: Tensor = x / self.number + self.left(one).relu() * self.right(other)
        return made


def _emptied(layer: nn.Module, rows: Sequence[int]) -> None:
    empty(layer.get_parameter("weight"), *rows)
    with torch.no_grad():
        layer.get_parameter("bias")[list(rows)] = 0


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("sizes", [(8, 8, 8), [8, 8, 8], 8])
def test_sizes_of_equal_parts(sizes: Any, nested: bool) -> None:
    module = Gated(sizes)
    _emptied(module.into, (2, 10, 18, 5, 13, 21))
    model: nn.Module = nn.Sequential(nn.Linear(16, 16), module) if nested else module
    small, plan = pruned(filled(model), torch.randn(ROWS))
    inside = small.get_submodule("1") if nested else small
    assert inside.pieces == (type(sizes)([6, 6, 6]) if not isinstance(sizes, int) else 6)
    assert module.pieces == (type(sizes)([8, 8, 8]) if not isinstance(sizes, int) else 8)
    assert inside.get_submodule("into").out_features == 18
    assert plan.report.refused == ()


def test_half_of_a_number() -> None:
    model = Halved()
    _emptied(model.into, (0, 1, 12, 20, 3, 15))
    small, _ = pruned(filled(model), torch.randn(ROWS))
    assert (small.width, small.get_submodule("into").out_features) == (18, 18)


@pytest.mark.parametrize("kind", [tuple, list])
def test_parts_of_different_sizes_and_a_plan_from_a_file(kind: type[Sequence[int]], tmp_path: Path) -> None:
    model = Uneven(kind((6, 10, 8)))  # type: ignore[call-arg]
    _emptied(model.into, (0, 1, 7, 20, 21, 22))
    small, plan = pruned(filled(model), torch.randn(ROWS))
    assert small.sizes == kind((4, 9, 5))  # type: ignore[call-arg]
    plan.save(tmp_path / "plan.safetensors")
    again = sparsefx.apply_channel_plan(model, sparsefx.ChannelPlan.load(tmp_path / "plan.safetensors"))
    x = torch.randn(ROWS)
    assert torch.equal(again(x), small(x))
    assert again.sizes == small.sizes


def test_a_number_that_is_more_than_a_size_stays_and_so_do_the_channels() -> None:
    model = Counted()
    _emptied(model.into, (0, 12))
    small, plan = pruned(filled(model), torch.randn(ROWS))
    assert (small.number, small.get_submodule("into").out_features) == (12, 24)
    assert plan.report.refused


def test_code_that_asks_the_tensor_keeps_numbers_that_happen_to_be_equal() -> None:
    class Asking(Halved):
        def forward(self, x: Tensor) -> Tensor:
            one, other = self.into(x).chunk(2, dim=-1)
            made: Tensor = x + self.left(one).relu() * self.right(other)
            return made

    model = Asking()
    _emptied(model.into, (0, 1, 12, 20))
    small, _ = pruned(filled(model), torch.randn(ROWS))
    assert (small.width, small.get_submodule("into").out_features) == (24, 20)
