"""Classes of channels are ranked by the magnitudes of all their filters, block by block."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from sparsefx.patterns import CoupledChannel, parse
from sparsefx.patterns.coupled_channel import Coupled, Coupling

PATTERN = CoupledChannel()


def _two_layers() -> tuple[Coupling, list[Coupled]]:
    """Classes 0 to 3 are channels of both layers; 4 and 5 are pairs of rows of the second; its last row always stays."""
    blocks = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 6]])
    coupling = Coupling(blocks, (4, 2), 6)
    first = Coupled(coupling, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3]), torch.tensor([[0], [1], [2], [3]]))
    second = Coupled(
        coupling,
        torch.tensor([3, 2, 1, 0, 4, 4, 5, 5, 6]),
        torch.tensor([3, 2, 1, 0, 4, 5]),
        torch.tensor([[0, 9], [1, 9], [2, 9], [3, 9], [4, 5], [6, 7]]),
    )
    return coupling, [first, second]


def _rows(mask: torch.Tensor) -> list[int]:
    some = mask.flatten(1).any(1)
    assert torch.equal(some, mask.flatten(1).all(1))
    found: list[int] = some.nonzero().flatten().tolist()
    return found


def test_parses_to_itself() -> None:
    assert parse("channel:coupled") == PATTERN
    assert parse(PATTERN.name) == PATTERN
    assert parse("channel") != PATTERN


def test_a_class_counts_by_all_its_filters() -> None:
    _, members = _two_layers()
    first = torch.tensor([5.0, 4.0, 3.0, 1.0])[:, None] * torch.ones(4, 2)
    second = torch.tensor([9.0, 0.0, 1.0, 0.0, 1.0, 1.0, 3.0, 0.0, 0.1])[:, None] * torch.ones(9, 3)
    # Sums: 0: 10, 1: 8 + 3, 2: 6, 3: 2 + 27; and 4: 6, 5: 9.
    masks = PATTERN.choose([-first, second], members, 0.5, [1, 1])
    assert _rows(masks[0]) == [1, 3]
    assert _rows(masks[1]) == [0, 2, 6, 7, 8]


def test_of_equal_classes_the_first_stays_and_of_each_block_at_least_one() -> None:
    _, members = _two_layers()
    masks = PATTERN.choose([torch.ones(4, 2), torch.ones(9, 3)], members, 0.01, [1, 1])
    assert _rows(masks[0]) == [0]
    assert _rows(masks[1]) == [3, 4, 5, 8]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_format_and_memory_layout(dtype: torch.dtype) -> None:
    _, members = _two_layers()
    first = torch.arange(1, 4 * 2 * 9 + 1, dtype=dtype).view(4, 2, 3, 3).to(memory_format=torch.channels_last)
    second = torch.zeros(5, 9, dtype=dtype).t()
    masks = PATTERN.choose([first, second], members, 0.25, [1, 1])
    assert _rows(masks[0]) == [3]
    assert [mask.stride() for mask in masks] == [first.stride(), second.stride()]


def test_masks_widen_to_whole_classes_as_far_as_there_is_room() -> None:
    _, members = _two_layers()
    first, second = torch.zeros(4, 2, dtype=torch.bool), torch.zeros(9, 3, dtype=torch.bool)
    first[1, 0] = second[0] = second[7, 2] = True
    widened = PATTERN.widened([first, second], members, 0.5, [1, 1])
    assert widened is not None
    assert _rows(widened[0]) == [1, 3]
    assert _rows(widened[1]) == [0, 2, 6, 7, 8]
    assert PATTERN.widened([first, second], members, 0.25, [1, 1]) is None


def test_copies_share_a_coupling_among_themselves_only() -> None:
    coupling, members = _two_layers()
    for made in (copy.deepcopy(members), pickle.loads(pickle.dumps(members))):
        assert made[0].coupling is made[1].coupling
        assert made[0].coupling is not coupling
