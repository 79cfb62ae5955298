"""N:M whose last group may be shorter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsefx
from sparsefx.patterns import NOfM, Padded, parse


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 13), st.integers(0, 1), st.integers(0, 2**31))
def test_masks_are_the_best_of_each_group_counted_by_hand(n: int, m: int, length: int, axis: int, seed: int) -> None:
    n = min(n, m)
    scores = torch.randint(0, 6, (3, length, 2), generator=torch.Generator().manual_seed(seed)).float().movedim(1, axis)
    mask = Padded(n, m).mask(scores, reduction_axis=axis)
    assert mask.shape == scores.shape
    lines, kept = scores.movedim(axis, -1).reshape(-1, length), mask.movedim(axis, -1).reshape(-1, length)
    for line, stays in zip(lines.tolist(), kept.tolist(), strict=True):
        for start in range(0, length, m):
            group = line[start : start + m]
            best = sorted(range(len(group)), key=lambda place: (-group[place], place))[:n]
            assert [place for place, stay in enumerate(stays[start : start + m]) if stay] == sorted(best)


def test_whole_groups_get_the_ordinary_mask() -> None:
    scores = torch.randn(16, 24, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(parse("2:4-padded").mask(scores), parse("2:4").mask(scores))
    assert parse("2:4-padded") == Padded(2, 4) != NOfM(2, 4)


@pytest.mark.parametrize("algorithm", ["static", "magnitude", "rigl", "sr-ste"])
def test_masks_of_an_image_convolution_stay_so_in_training(algorithm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    sparsefx.sparsify(model, pattern="2:4-padded", algorithm=algorithm, eligibility=sparsefx.Eligibility(multiple=1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    every = {} if algorithm == "static" else {"rewire_every": 2}
    runtime = sparsefx.attach(model, optimizer, total_steps=4, **every)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()
    runtime.detach()
    mask = sparsefx.masks(model)["0.weight"]
    assert int(mask.sum(1).max()) <= 2
    assert torch.equal(model[0].weight != 0, mask)
    row = sparsefx.audit(model).layers[0]
    assert row.tensor_core_reason == "3 inputs is not a multiple of 16; export with pad_channels=True"


def test_pruned_channels_leave_groups_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 10, 3), nn.ReLU(), nn.Conv2d(10, 16, 3)).eval()
    with torch.no_grad():
        model[0].weight[:5] = 0
        model[0].bias[:5] = 0
    sparsefx.sparsify(model, pattern="2:4-padded", algorithm="static", eligibility=sparsefx.Eligibility(multiple=1))
    x = torch.randn(2, 16, 8, 8)
    small = sparsefx.prune_channels(model, x, multiple=1)
    assert small[0].weight.shape[0] < 10
    weight = nn.functional.pad(small[2].weight.detach(), (0, 0, 0, 0, 0, -small[2].weight.shape[1] % 4))
    assert int((weight != 0).unflatten(1, (-1, 4)).sum(2).max()) <= 2
    torch.testing.assert_close(small(x), model(x))
