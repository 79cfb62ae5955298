"""The benchmark of the time to prune tells every part of it."""

from __future__ import annotations

import torch

from benchmarks.prune_scaling import PARTS, long_network, ours, told


def test_every_part_of_pruning_is_timed() -> None:
    model = long_network(28)
    pruned, spent = ours(model, torch.zeros(1, 3, 10, 10))
    assert sum(parameter.numel() for parameter in pruned.parameters()) < sum(one.numel() for one in model.parameters())
    assert [part for part in PARTS if not spent[part] > 0] == []
    assert sum(spent[part] for part in (*PARTS, "analysis")) <= spent["all"] * 1.001
    assert all(f"{part} " in told(spent) for part in PARTS)
